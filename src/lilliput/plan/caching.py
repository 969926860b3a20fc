"""What steps that say how keys and values are stored add to a plan: the layout, the config's entries, and tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.anatomy.cached import PLAIN, kinds
from lilliput.errors import LilliputError, PlanError, SourceError
from lilliput.export import cache_scheme
from lilliput.model.stored import served_dtype
from lilliput.model.weights import Model
from lilliput.parts.linear import plain_config
from lilliput.plan.resolve import Resolved
from lilliput.recipe.schema import Where
from lilliput.runtime.behaviours.state import TOKENS
from lilliput.runtime.caches import Entry
from lilliput.runtime.caches.codec import Shapes
from lilliput.runtime.caches.hooks import attention_of
from lilliput.runtime.caches.look import shape_of
from lilliput.runtime.caches.turns import rotation
from lilliput.units import few, size
from lilliput.verbs.behave import Behave
from lilliput.verbs.cache import Cache, chosen, group_of
from lilliput.verbs.spec import Stage, Task

NATIVE = "lilliput"  # the layout that has every cache
CONTEXT = 4096  # tokens of which a plan says what they take


def assigned(model: Model, resolved: Resolved) -> dict[int, Task]:
    """By block, the step that says how it stores keys and values.

    Raises PlanError for a block that cannot: one that sees only a window, shares its cache, or has no cache that grows.
    """
    count = len(model.skeleton.block_names)
    by_block: dict[int, Task] = {}
    for task in resolved.at(Stage.CACHE):
        if resolved.recipe.steps[task.step].where != Where():
            raise PlanError(f"{task.label} is about blocks, and `where` names linears: give `layers` in its place")
        named = chosen(task.options, count)  # type: ignore[arg-type]
        growing = able(model)
        wrong = [x for x in named or () if x not in growing]
        if wrong:
            raise PlanError(
                f"{task.label}: {model.skeleton.block_names[wrong[0]]} keeps no growing cache of its own (transformers "
                f"has {_kind(model, wrong[0])} for it), so it has none to compress: leave it out of `layers`"
            )
        if not growing:
            raise PlanError(
                f"{task.label}: no block of {model.anatomy().architecture} keeps a growing cache of its own "
                f"(transformers has {_kind(model, 0)} for the first): leave the step out"
            )
        by_block |= dict.fromkeys(growing if named is None else named, task)
    return dict(sorted(by_block.items()))


def weighed(resolved: Resolved, samples: int) -> int:
    """How many of `samples` calibration samples gradients are taken of, for steps that weigh what blocks store by them;
    0: none does."""
    tasks = [x for x in resolved.at(Stage.CACHE) if x.of(Cache).weighs(x.options)]
    return max((min(samples, x.of(Cache).samples(x.options)) for x in tasks), default=0)


def weighing(model: Model, resolved: Resolved) -> frozenset[int]:
    """The blocks whose step does so."""
    return frozenset(n for n, x in assigned(model, resolved).items() if x.of(Cache).weighs(x.options))


def able(model: Model) -> tuple[int, ...]:
    """The blocks that keep a growing cache of their own."""
    count, found = len(model.skeleton.block_names), kinds(model.skeleton.config)
    # Where fewer caches than blocks are made, the others read those of earlier blocks.
    return tuple(n for n, x in enumerate(found) if x == PLAIN) if len(found) == count else ()


def _kind(model: Model, block: int) -> str:
    found = kinds(model.skeleton.config)
    if len(found) != len(model.skeleton.block_names):
        return f"{len(found)} caches for {len(model.skeleton.block_names)} blocks"
    return f"a {found[block]}"


def notes(model: Model, resolved: Resolved) -> tuple[str, ...]:
    """What the cache takes, and which blocks keep a plain one."""
    if not resolved.at(Stage.CACHE):
        return ()
    names, planned = model.skeleton.block_names, entries(model, resolved)
    item = 8 * served_dtype(model).itemsize
    coded = sum(len(x.blocks) * x.spec.size_bits(CONTEXT, x.shape, item) for x in planned) / 8
    plain = sum(len(x.blocks) * x.shape.plain_bits(CONTEXT, item) for x in planned) / 8
    said = f"Keys and values of {CONTEXT} tokens take {size(coded)} in place of {size(plain)}."
    left = [names[n] for n in range(len(names)) if n not in assigned(model, resolved)]
    if not left:
        return (said,)
    return (said, f"{len(left)} of {len(names)} blocks keep keys and values as they are: {few(left)}.")


def entries(model: Model, resolved: Resolved) -> tuple[Entry, ...]:
    """The config's entries: blocks that store alike are one. Raises PlanError for what cannot be carried out."""
    grouped: dict[tuple[Any, ...], list[str]] = {}
    for number, task in assigned(model, resolved).items():
        one = entry(model, resolved, number, task)
        grouped.setdefault((one.spec, one.attention, one.shape), []).extend(one.blocks)
    return tuple(Entry(spec, tuple(names), attention, shape) for (spec, attention, shape), names in grouped.items())


def entry(model: Model, resolved: Resolved, number: int, task: Task) -> Entry:
    """What a step makes of the cache of one block. Raises PlanError for what cannot be carried out."""
    block, name = model.skeleton.block(number), model.skeleton.block_names[number]
    try:
        attention = attention_of(block)
        shape = shape_of(model.skeleton, number)
        raw = resolved.recipe.steps[task.step].target
        verb = task.of(Cache)
        spec = verb.codec(task.target.bits or 0, group_of(raw, shape), task.options, True)
        # Only of a codec that asks for it does one need to know how the model rotates keys.
        if spec.turns() and rotation(block.get_submodule(attention)) is None:
            spec = verb.codec(task.target.bits or 0, group_of(raw, shape), task.options, False)
        spec.check(shape)
    except (PlanError, SourceError) as error:
        raise PlanError(f"{task.label}: {name}: {error}") from None
    return Entry(spec, (name,), attention, shape)


def engines_refuse(model: Model, planned: Sequence[Entry]) -> str | None:
    """Why compressed-tensors cannot say how these caches are stored; None where it can."""
    reason = cache_scheme.refuse(planned, model.skeleton.model, model.skeleton.block_names)
    if reason is not None:
        return reason
    name = next(x for x in model.skeleton.names_of(0) if x in model.refs)
    if model.stored_name(name) != name:
        return f"engines look for scales by the names of the files, which are others ({model.stored_name(name)})"
    return None


def check(model: Model, resolved: Resolved) -> None:
    """Raises PlanError where the model's code does not let a step do what it asks for."""
    tasks = resolved.at(Stage.CACHE)
    if not tasks:
        return
    for other in resolved.at(Stage.RUNNING):
        if other.of(Behave).entry(model.anatomy(), other.options)["kind"] == TOKENS:
            raise PlanError(
                f"{tasks[0].label} is measured on texts that are read in pieces, and {other.label} prunes only what is "
                "read at once: leave one of them out"
            )
    entries(model, resolved)
    try:
        model.skeleton.calls(1, 2, past=2)
    except (LilliputError, *_BROKEN) as error:
        raise PlanError(
            f"{tasks[0].label}: {model.anatomy().architecture} cannot go on from tokens that it has read ({error}): "
            "leave the step out"
        ) from None


_BROKEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def config(entry: dict[str, Any] | None, planned: Sequence[Entry], layout: str) -> dict[str, Any] | None:
    """The entry `quantization_config` with the compressed caches."""
    if not planned:
        return entry
    if layout != NATIVE:
        return cache_scheme.described(entry)
    mine = plain_config({}, caches=[x.plain() for x in planned])
    return mine if entry is None else entry | {key: mine[key] for key in ("version", "caches")}


def tensors(planned: Sequence[Entry], names: Sequence[str]) -> Mapping[int, Shapes]:
    """The static tensors, by number of the block; names: of all blocks."""
    added: dict[int, Shapes] = {}
    for entry in planned:
        own = entry.spec.stored(entry.shape)
        for block in entry.blocks if own else ():
            full = entry.names(block)
            added[names.index(block)] = {full[name]: x for name, x in own.items()}
    return added
