"""What steps that say how the finished model runs, or how it stores keys and values, add to a plan: the layout, the
config's entry, and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lilliput.anatomy.wrapper import skeleton
from lilliput.errors import PlanError, SourceError
from lilliput.export import cache_scheme
from lilliput.model.weights import Model
from lilliput.parts.linear import plain_config
from lilliput.plan import caching
from lilliput.plan.resolve import Resolved
from lilliput.runtime.behaviours.received import attention_of
from lilliput.runtime.behaviours.state import TOKENS
from lilliput.verbs import behave
from lilliput.verbs.behave import Behave, Shapes
from lilliput.verbs.choose import Choose
from lilliput.verbs.spec import Stage

LAYOUT = caching.NATIVE


def layout(model: Model, resolved: Resolved, wanted: str) -> str:
    """The layout to ask for: only one has behaviours and every compressed cache, engines' own has one cache. Raises
    PlanError where the recipe asks for another one."""
    choosing = next((x for x in resolved.of(Choose) if x.of(Choose).stores(x.options) is not None), None)
    says = {Stage.CACHE: "stores keys and values", Stage.RUNNING: "runs"}
    tasks = [(task, what) for stage, what in says.items() for task in resolved.at(stage)]
    tasks += [] if choosing is None else [(choosing, says[Stage.CACHE])]
    if not tasks:
        return wanted
    reason = None
    if not resolved.at(Stage.RUNNING) and choosing is None:
        reason = caching.engines_refuse(model, caching.entries(model, resolved))
        if reason is None:
            return wanted
    if wanted not in ("auto", LAYOUT):
        first, what = tasks[0]
        raise PlanError(
            f"{first.label} needs a layout that says how a model {what}, and '{wanted}' does not"
            f"{f' ({reason})' if reason else ''}: set `export: {LAYOUT}`, or leave `export` out"
        )
    return LAYOUT


def refuse(entry: dict[str, Any] | None, resolved: Resolved, layout: str) -> str | None:
    """What stands against a layout whose config says `entry` of the weights."""
    if layout == LAYOUT or not resolved.at(Stage.CACHE) or not (entry or {}).get("dequantize"):
        return None
    return (
        "transformers decodes its weights while it loads, and passes over what it says of the cache. Nearest: "
        "symmetric: true, or leave the cache as it is; export 'lilliput' holds both."
    )


def note(layout: str, config: dict[str, Any] | None, model: Model, resolved: Resolved) -> str | None:
    """Who stores keys and values as an engine's own layout says it, in a sentence."""
    if layout == LAYOUT or config is None or not resolved.at(Stage.CACHE):
        return None
    if cache_scheme.found_by_transformers(skeleton(model.config), config):
        return "vLLM stores keys and values in 8 bits; transformers rounds them and stores them as they are."
    return (
        "vLLM stores keys and values in 8 bits. transformers would keep them as they are: the installed "
        "compressed-tensors does not find the attentions of the installed release. For both take export 'lilliput'."
    )


def check(model: Model, resolved: Resolved) -> None:
    """Raises PlanError where the model's code does not let a step do what it asks for."""
    for task in resolved.at(Stage.RUNNING):
        entry = task.of(Behave).entry(model.anatomy(), task.options)
        if entry["kind"] == TOKENS:
            for block in range(len(model.skeleton.block_names)):
                try:
                    attention_of(model.skeleton.block(block))
                except SourceError as error:
                    raise PlanError(f"{task.label}: {error}") from None
    caching.check(model, resolved)


def config(entry: dict[str, Any] | None, resolved: Resolved, model: Model, layout: str) -> dict[str, Any] | None:
    """The entry `quantization_config` with the behaviours and the caches of the recipe's steps."""
    tasks = resolved.at(Stage.RUNNING)
    if tasks:
        mine = plain_config({}, [task.of(Behave).entry(model.anatomy(), task.options) for task in tasks])
        version = max(mine["version"], 0 if entry is None else entry["version"])
        entry = (entry or mine) | {"version": version, "behaviours": mine["behaviours"]}
    return caching.config(entry, caching.entries(model, resolved), layout)


def tensors(resolved: Resolved, model: Model) -> Mapping[int, Shapes]:
    """The tensors that the steps add, by block."""
    anatomy = model.anatomy()
    added: dict[int, Shapes] = {**caching.tensors(caching.entries(model, resolved), anatomy.block_names)}
    for task in resolved.at(Stage.RUNNING):
        for block in range(len(anatomy.blocks)):
            own = behave.tensors(task, anatomy, block)
            if own:
                added[block] = {**added.get(block, {}), **own}
    return added
