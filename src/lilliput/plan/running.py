"""What steps that say how the finished model runs, or how it stores keys and values, add to a plan: the layout, the
config's entry, and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lilliput.errors import PlanError, SourceError
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

LAYOUT = "lilliput"


def layout(resolved: Resolved, wanted: str) -> str:
    """The layout to ask for: only one has behaviours and compressed caches. Raises PlanError where the recipe asks for
    another one."""
    choosing = next((x for x in resolved.of(Choose) if x.of(Choose).stores(x.options) is not None), None)
    says = {Stage.CACHE: "stores keys and values", Stage.RUNNING: "runs"}
    tasks = [(task, what) for stage, what in says.items() for task in resolved.at(stage)]
    tasks += [] if choosing is None else [(choosing, says[Stage.CACHE])]
    if not tasks:
        return wanted
    if wanted not in ("auto", LAYOUT):
        first, what = tasks[0]
        raise PlanError(
            f"{first.label} needs a layout that says how a model {what}, and '{wanted}' does not: set `export: "
            f"{LAYOUT}`, or leave `export` out"
        )
    return LAYOUT


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


def config(entry: dict[str, Any] | None, resolved: Resolved, model: Model) -> dict[str, Any] | None:
    """The entry `quantization_config` with the behaviours and the caches of the recipe's steps."""
    tasks = resolved.at(Stage.RUNNING)
    if tasks:
        mine = plain_config({}, [task.of(Behave).entry(model.anatomy(), task.options) for task in tasks])
        version = max(mine["version"], 0 if entry is None else entry["version"])
        entry = (entry or mine) | {"version": version, "behaviours": mine["behaviours"]}
    return caching.config(entry, caching.entries(model, resolved))


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
