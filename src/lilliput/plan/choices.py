"""What a step that chooses from a menu may decide: items with the bytes of their options, and the room for them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lilliput import units
from lilliput.budget import choice, menu
from lilliput.budget.choice import Choice, Item
from lilliput.budget.curve import Curve
from lilliput.errors import PlanError
from lilliput.formats import known
from lilliput.model.weights import Model
from lilliput.parts.linear import divides
from lilliput.plan.candidates import Candidates, counted, keys, sentence
from lilliput.plan.plan import Plan, divided
from lilliput.plan.resolve import OUTSIDE, LinearPlan, retargeted
from lilliput.plan.sizes import sizes
from lilliput.target import Target
from lilliput.verbs.choose import Choose, Goal
from lilliput.verbs.scores import Scores
from lilliput.verbs.spec import Task

_MIDDLE = 3.25  # stored bits of a weight near which linears are tried
_DIGITS = 64  # bytes by which a recipe that names another size may be longer
_WORDS = 400  # bytes by which what is said of a choice may be longer than of another one
_HALVINGS = 20
_ROUNDS = 8  # of choosing anew where headers and the like depend on the choice

Sized = Callable[[Plan], Plan]
"""The plan with the most bytes that lie beside its weights, and with the time that a decoding step takes."""


@dataclass(frozen=True)
class Predictions:
    """By linear, the loss in nats of each entry of the menu where nothing else changes; `curve`: what losses come to
    together."""

    losses: Scores
    curve: Curve


def middle(pool: Candidates, linear: LinearPlan) -> int:
    """The entry, by number in the menu, with which a linear is tried: of those that leave it as it lies, where there
    are any, the one nearest to 3 bits."""
    options = pool.options[linear.name]
    plain = [j for j in options if not menu.turned(options[j][0]) and not menu.pruned(options[j][0])] or list(options)
    return min(plain, key=lambda j: (abs(8 * options[j][1] / linear.linear.parameters - _MIDDLE), j))


def steps(plan: Plan) -> tuple[Task, ...]:
    """The steps that choose from a menu."""
    return plan.resolved.of(Choose)


def entries(task: Task) -> tuple[str, ...]:
    """The menu of a step."""
    return task.of(Choose).entries(task.options)


def candidates(plan: Plan, task: Task) -> Candidates:
    """What each linear that the step governs can have. Raises PlanError where that is nothing."""
    spec, governed = task.of(Choose), plan.resolved.governed(task)
    menu_entries = entries(task)
    options: dict[str, dict[int, tuple[Target, int]]] = {}
    together: dict[str, list[str]] = {}
    why = ""
    for x in plan.resolved.planned:
        if x.name not in governed:
            continue
        size = sizes(plan, x, governed[x.name])
        entries_of: dict[int, tuple[Target, int]] = {}
        distinct: set[Target] = set()
        for j, entry in enumerate(menu_entries):
            target = known.fitting(menu.on(governed[x.name].target, entry), x.linear.in_features)
            if target in distinct:
                continue  # narrow rows have one type in place of several
            distinct.add(target)
            try:
                if not _whole(x, target, spec.fused(task.options)) or not _fits(x, governed[x.name], target):
                    why = f"groups of {entry} do not divide its {x.linear.in_features} inputs"
                    continue
                entries_of[j] = target, size(target)
            except PlanError as error:
                why = str(error)
        if not entries_of:
            raise PlanError(
                f"{task.label}: {x.name} can have none of the menu's entries {', '.join(menu_entries)}: {why}"
            )
        options[x.name] = entries_of
        together.setdefault(spec.together(x.name, x.linear, task.options), []).append(x.name)
    result = Candidates(options, {key: tuple(names) for key, names in together.items()}, plan.context)
    for item in result.items():
        if not item.options:
            raise PlanError(f"{task.label}: {item.name} share one entry, and none of the menu's fits all of them")
    return result


def _whole(x: LinearPlan, target: Target, engine: bool) -> bool:
    """Engines read whole groups alone."""
    group = target.group_size
    return not (engine and isinstance(group, int) and group > 0 and x.linear.in_features % group)


def _fits(x: LinearPlan, task: Task, target: Target) -> bool:
    """The rows of a table have to lie apart. Raises PlanError for a grid that the linear cannot have."""
    scheme = retargeted(x, task, target).scheme
    if x.block == OUTSIDE and menu.pruned(target):
        return False
    return x.block != OUTSIDE or divides(scheme, x.linear.out_features, x.linear.in_features)


def payload(plan: Plan, options: Candidates) -> int:
    """Bytes in the plan of what is chosen among."""
    return sum(x.nbytes for x in plan.tensors if x.source in options.options)


def room(plan: Plan, task: Task, options: Candidates) -> int:
    """Bytes for what is chosen among."""
    goal = task.of(Choose).goal(task.options)
    if goal.size is not None:
        return goal.size - (plan.whole_bytes - payload(plan, options) - _cached(plan))
    if goal.bits is None:
        raise PlanError(f"{task.label}: it keeps to a size, an average of bits or a time: give one of them")
    return int(goal.bits * _weights(plan, options) / 8)


def _cached(plan: Plan) -> int:
    """Bytes in the plan of the keys and values that are chosen for."""
    return 0 if plan.context is None else sum(min(x.sizes.values()) for x in plan.context.choosing)


def _weights(plan: Plan, options: Candidates) -> int:
    linears = plan.resolved.planned
    return sum(x.linear.parameters for x in linears if x.name in options.options)


def feasible(plan: Plan, model: Model, task: Task, sized: Sized) -> None:
    """Raises PlanError where a step that chooses cannot keep to its goal, with the smallest that is possible and what
    holds it up."""
    goal = task.of(Choose).goal(task.options)
    if sum(x is not None for x in (goal.size, goal.bits, goal.seconds)) > 1:
        raise PlanError(f"{task.label}: a size, an average of bits and a time contradict each other: give one of them")
    if goal.size is None and task.of(Choose).stores(task.options) is not None:
        raise PlanError(f"{task.label}: `context` counts keys and values in a `size`: give one, or leave `context` out")
    pool = candidates(plan, task)
    items = pool.items()
    if goal.seconds is not None:
        _fast_enough(plan, model, task, pool, items, sized)
        return
    whole = original(model) + (0 if plan.context is None else plan.context.plain_bytes)
    if goal.size is not None and goal.size > whole:
        cache = "" if plan.context is None else f" with keys and values of {plan.context.tokens} tokens"
        raise PlanError(
            f"--size {units.readable(goal.size)} is more than the model itself takes{cache} "
            f"({units.readable(whole)}): there is nothing to compress"
        )
    least = choice.smallest(items)
    if goal.size is None:
        if least.bytes > room(plan, task, pool):
            raise PlanError(_too_few_bits(plan, task, pool, least))
        return
    chooser = _Chooser(plan, model, task, Predictions({}, Curve()), sized, pool, items)
    smallest = chooser.laid(least)
    if smallest.whole_bytes + _WORDS > goal.size:
        raise PlanError(_too_small(smallest, task, pool, chooser.items, least))


def _fast_enough(plan: Plan, model: Model, task: Task, pool: Candidates, items: Sequence[Item], sized: Sized) -> None:
    goal, least = task.of(Choose).goal(task.options), choice.smallest(items)
    result = sized(_with(plan, model, task, pool, items, least))
    if goal.seconds is not None and result.decoding is not None and result.decoding > goal.seconds:
        raise PlanError(
            f"--decode-time {1e3 * goal.seconds:g}ms is too short: with the menu's smallest grids everywhere a step is "
            f"predicted to take {1e3 * result.decoding:.4g}ms. Embedding, head, attention and cache stay as they are"
        )


def _with(plan: Plan, model: Model, task: Task, pool: Candidates, items: Sequence[Item], chosen: Choice) -> Plan:
    """The plan with a choice."""
    settled = replace(plan, context=None if plan.context is None else plan.context.settled)
    return divided(settled, model, pool.resolved(plan.resolved, task, items, chosen))


def original(model: Model) -> int:
    """Bytes of the source: its tensors and the files beside them."""
    others = sum(path.stat().st_size for path in model.source.side_files().values())
    return sum(x.nbytes for x in model.source.stored.values()) + others


def _too_few_bits(plan: Plan, task: Task, pool: Candidates, least: Choice) -> str:
    smallest_bits = 8 * least.bytes / _weights(plan, pool)
    return (
        f"--bits {task.of(Choose).goal(task.options).bits} is less than the smallest entries of the menu take: "
        f"{smallest_bits:.3f} bits a weight with scales. Nearest: that, or a --menu with larger groups"
    )


def _too_small(smallest: Plan, task: Task, pool: Candidates, items: Sequence[Item], least: Choice) -> str:
    """`smallest` is the plan with the fewest bytes everywhere."""
    whole = smallest.whole_bytes + _WORDS + _DIGITS
    context, beside = smallest.context, ""
    taken = sum(x.options[j].bytes for x, j in zip(items, least.picks, strict=True) if x.name in pool.together)
    rest = whole - taken
    if context is not None:
        rest -= context.bytes
        beside = f", {units.readable(context.bytes)} keys and values of {context.tokens} tokens, at the fewest bits"
    kinds: Counter[str] = Counter()
    for x in smallest.tensors:
        if x.source not in pool.options:
            kinds[x.kind] += x.nbytes
    kinds["files beside the weights"] = whole - smallest.bytes - (0 if context is None else context.bytes)
    named = ", ".join(f"{kind} {units.readable(size)}" for kind, size in kinds.most_common(2) if size > 0)
    size = task.of(Choose).goal(task.options).size or 0
    return (
        f"--size {units.readable(size)} is too small: the smallest that this menu makes is {whole} bytes "
        f"({units.readable(whole, up=True)}). {units.readable(taken)} are what it compresses, at the menu's "
        f"smallest grids{beside}; {units.readable(rest)} stay as they are ({named})"
    )


def decided(plan: Plan, model: Model, task: Task, predictions: Predictions, sized: Sized) -> Plan:
    """The plan with the choice of least summed loss that keeps to the step's goal. Raises PlanError where none does."""
    pool = candidates(plan, task)
    chooser = _Chooser(plan, model, task, predictions, sized, pool, pool.items(predictions.losses))
    goal = task.of(Choose).goal(task.options)
    best = chooser.timed(goal.seconds) if goal.seconds is not None else chooser.fitting(goal)
    if best is None:
        raise PlanError(f"{task.label}: nothing that was tried keeps to its goal; ask for a little more")
    return best


@dataclass(frozen=True)
class _Chooser:
    plan: Plan
    model: Model
    task: Task
    predictions: Predictions
    sized: Sized
    pool: Candidates
    items: Sequence[Item]

    def fitting(self, goal: Goal) -> Plan | None:
        """The best within a size or an average of bits. What lies beside the weights depends on the choice, so the room
        is measured anew after each."""
        left, lost = room(self.plan, self.task, self.pool), math.inf
        best: Plan | None = None
        limits: set[int] = set()
        while left not in limits and len(limits) < _ROUNDS:
            limits.add(left)
            chosen = choice.choose(self.items, left)
            if chosen is None:
                break
            result = self.laid(chosen)
            if (goal.size is None or result.whole_bytes <= goal.size) and chosen.loss < lost:
                best, lost = result, chosen.loss
            if goal.size is None:
                break
            left = goal.size - (result.whole_bytes - chosen.bytes)
        if best is None and goal.size is not None:
            result = self.laid(choice.smallest(self.items))
            best = result if result.whole_bytes <= goal.size else None
        return best

    def timed(self, seconds: float) -> Plan | None:
        """The best whose decoding step is fast enough: time rises with bytes, so bytes are halved in."""
        low, high = choice.smallest(self.items).bytes, choice.largest(self.items).bytes
        best: Plan | None = None
        at = high
        for _ in range(_HALVINGS):
            chosen = choice.choose(self.items, at)
            if chosen is None:
                break
            result = self.laid(chosen)
            if result.decoding is None:
                raise RuntimeError("a time was asked for, and nobody predicts it")
            if result.decoding <= seconds:
                best, low = result, at
            else:
                high = at
            if best is not None and low == high:
                break
            at = (low + high) // 2
        return best

    def laid(self, chosen: Choice) -> Plan:
        """The plan with a choice, what is said of it, and its size."""
        result = _with(self.plan, self.model, self.task, self.pool, self.items, chosen)
        kl = self.predictions.curve.at(chosen.loss)
        note = sentence(self.plan, self.task, self.pool, self.items, chosen, kl)
        return self.sized(replace(result, predicted_kl=kl, notes=(*result.notes, note)))


@dataclass(frozen=True)
class Point:
    """One choice of the curve: bytes of the whole folder, stored bits of a weight over what is chosen among, the KL
    divergence predicted, in nats, and how many linears got which entry; bytes of the keys and values that count, and
    how many blocks store them how."""

    folder_bytes: int
    bits: float
    kl: float
    chosen: Mapping[str, int]
    cache_bytes: int = 0
    caches: Mapping[str, int] = field(default_factory=dict)


def frontier(plan: Plan, model: Model, task: Task, predictions: Predictions, count: int, sized: Sized) -> list[Point]:
    """The best choices from the fewest bytes to the least loss, `count` sizes evenly apart."""
    pool = candidates(plan, task)
    items = pool.items(predictions.losses)
    low, high = choice.smallest(items).bytes, choice.largest(items).bytes
    points: dict[tuple[int, ...], Point] = {}
    for n in range(count):
        chosen = choice.choose(items, low + (high - low) * n // max(count - 1, 1))
        if chosen is None:
            raise RuntimeError("the smallest choice does not fit its own bytes")
        laid = sized(_with(plan, model, task, pool, items, chosen))
        bits = 8 * payload(laid, pool) / _weights(plan, pool)
        caches = {} if plan.context is None else plan.context.counts(keys(items, chosen))
        points[chosen.picks] = Point(
            laid.folder_bytes,
            bits,
            predictions.curve.at(chosen.loss),
            counted(task, pool, items, chosen),
            0 if laid.context is None else laid.context.bytes,
            caches,
        )
    return list(points.values())


def numbered(entries: int, options: Mapping[int, object], losses: Sequence[float]) -> tuple[float, ...]:
    """Losses at their numbers in the menu; 0 for entries that the linear cannot have, which nobody asks for."""
    values = dict(zip(options, losses, strict=True))
    return tuple(values.get(j, 0.0) for j in range(entries))
