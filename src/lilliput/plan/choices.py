"""What a step that chooses from a menu may decide: items with the bytes of their options, and the room for them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lilliput import units
from lilliput.budget import choice, menu
from lilliput.budget.choice import Choice, Item, Option
from lilliput.errors import PlanError
from lilliput.model.weights import Model
from lilliput.parts.linear import divides
from lilliput.plan.plan import Plan, divided
from lilliput.plan.resolve import OUTSIDE, LinearPlan, retargeted
from lilliput.plan.sizes import sizes
from lilliput.target import Target
from lilliput.verbs.choose import Choose
from lilliput.verbs.scores import Scores
from lilliput.verbs.spec import Task

_ROUNDS = 8  # of choosing anew where headers and the like depend on the choice

Sized = Callable[[Plan], Plan]
"""The plan with the most bytes that lie beside its weights."""


@dataclass(frozen=True)
class Candidates:
    """By linear, in order: the entries of the menu that it can have, by number, with their targets and bytes."""

    options: Mapping[str, Mapping[int, tuple[Target, int]]]
    together: Mapping[str, tuple[str, ...]]  # what shares one entry, by the name of the item

    def items(self, scores: Scores | None = None) -> list[Item]:
        """What is chosen among; without scores all losses are 0."""
        items = []
        for key, names in self.together.items():
            shared = set.intersection(*(set(self.options[name]) for name in names))
            items.append(
                Item(
                    key,
                    tuple(
                        Option(
                            j,
                            sum(self.options[name][j][1] for name in names),
                            0.0 if scores is None else math.fsum(scores[name][j] for name in names),
                        )
                        for j in sorted(shared)
                    ),
                )
            )
        return items

    def targets(self, items: Sequence[Item], chosen: Choice) -> dict[str, Target]:
        """By linear, what was chosen."""
        keys = {x.name: x.options[j].key for x, j in zip(items, chosen.picks, strict=True)}
        return {name: self.options[name][keys[key]][0] for key, names in self.together.items() for name in names}


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
        for j, entry in enumerate(menu_entries):
            target = menu.on(governed[x.name].target, entry)
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
    result = Candidates(options, {key: tuple(names) for key, names in together.items()})
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
    return x.block != OUTSIDE or divides(scheme, x.linear.out_features, x.linear.in_features)


def payload(plan: Plan, options: Candidates) -> int:
    """Bytes in the plan of what is chosen among."""
    return sum(x.nbytes for x in plan.tensors if x.source in options.options)


def room(plan: Plan, task: Task, options: Candidates) -> int:
    """Bytes for what is chosen among."""
    goal = task.of(Choose).goal(task.options)
    if goal.size is not None:
        return goal.size - (plan.folder_bytes - payload(plan, options))
    if goal.bits is None:
        raise PlanError(f"{task.label}: it needs a size or an average of bits: give one of them")
    return int(goal.bits * _weights(plan, options) / 8)


def _weights(plan: Plan, options: Candidates) -> int:
    linears = plan.resolved.planned
    return sum(x.linear.parameters for x in linears if x.name in options.options)


def feasible(plan: Plan, model: Model) -> Plan:
    """The plan itself. Raises PlanError where a step that chooses cannot keep to its goal, with the smallest that is
    possible and what holds it up."""
    for task in steps(plan):
        options = candidates(plan, task)
        items = options.items()
        least = choice.smallest(items)
        goal, limit = task.of(Choose).goal(task.options), room(plan, task, options)
        if goal.size is not None and goal.bits is not None:
            raise PlanError(f"{task.label}: a size and an average of bits contradict each other: give one of them")
        if goal.size is not None and goal.size > (whole := original(model)):
            raise PlanError(
                f"--size {units.readable(goal.size)} is more than the model itself takes ({units.readable(whole)}): "
                "there is nothing to compress"
            )
        if least.bytes > limit:
            raise PlanError(_too_small(plan, task, options, items, least, limit))
    return plan


def original(model: Model) -> int:
    """Bytes of the source: its tensors and the files beside them."""
    others = sum(path.stat().st_size for path in model.source.side_files().values())
    return sum(x.nbytes for x in model.source.stored.values()) + others


def _too_small(plan: Plan, task: Task, options: Candidates, items: Sequence[Item], least: Choice, limit: int) -> str:
    goal = task.of(Choose).goal(task.options)
    if goal.size is None:
        smallest_bits = 8 * least.bytes / _weights(plan, options)
        return (
            f"--bits {goal.bits} is less than the smallest entries of the menu take: {smallest_bits:.3f} "
            "bits a weight with scales. Nearest: that, or a --menu with larger groups"
        )
    rest = plan.folder_bytes - payload(plan, options)
    kinds: Counter[str] = Counter()
    for x in plan.tensors:
        if x.source not in options.options:
            kinds[x.kind] += x.nbytes
    kinds["files beside the weights"] = plan.folder_bytes - plan.bytes
    named = ", ".join(f"{kind} {units.readable(size)}" for kind, size in kinds.most_common(2) if size)
    smallest = least.bytes + rest
    return (
        f"--size {units.readable(goal.size)} is too small: the smallest that this menu makes is {smallest} bytes "
        f"({units.readable(smallest, up=True)}): {units.readable(least.bytes)} for what it compresses, at the "
        f"menu's smallest entries, and {units.readable(rest)} that stay unchanged ({named})"
    )


def decided(plan: Plan, model: Model, task: Task, scores: Scores, sized: Sized) -> Plan:
    """The plan with the choice of least summed loss that keeps to the step's goal. Raises PlanError where none does.

    What lies beside the weights depends on the choice, so the room is measured anew after each.
    """
    options = candidates(plan, task)
    items = options.items(scores)
    goal, limit = task.of(Choose).goal(task.options), room(plan, task, options)
    best: Plan | None = None
    attempts: set[int] = set()
    while limit not in attempts and len(attempts) < _ROUNDS:
        attempts.add(limit)
        chosen = choice.choose(items, limit)
        if chosen is None:
            break
        result = divided(plan, model, plan.resolved.with_targets(task, options.targets(items, chosen)))
        note = sentence(task, options, items, chosen)
        result = sized(replace(result, predicted_kl=chosen.loss, notes=(*result.notes, note)))
        fits = goal.size is None or result.folder_bytes <= goal.size
        if fits and (best is None or chosen.loss < (best.predicted_kl or 0.0)):
            best = result
        if goal.size is None:
            break
        limit = goal.size - (result.folder_bytes - chosen.bytes)
    if best is None:
        raise PlanError(f"{task.label}: no choice that was tried fits the size; ask for a little more")
    return best


@dataclass(frozen=True)
class Point:
    """One choice of the curve: bytes of the whole folder, stored bits of a weight over what is chosen among, the KL
    divergence predicted, in nats, and how many linears got which entry."""

    folder_bytes: int
    bits: float
    kl: float
    chosen: Mapping[str, int]


def frontier(plan: Plan, model: Model, task: Task, scores: Scores, count: int, sized: Sized) -> list[Point]:
    """The best choices from the fewest bytes to the least loss, `count` sizes evenly apart."""
    options = candidates(plan, task)
    items = options.items(scores)
    low, high = choice.smallest(items).bytes, choice.largest(items).bytes
    points: dict[tuple[int, ...], Point] = {}
    for n in range(count):
        chosen = choice.choose(items, low + (high - low) * n // max(count - 1, 1))
        if chosen is None:
            raise RuntimeError("the smallest choice does not fit its own bytes")
        laid = sized(divided(plan, model, plan.resolved.with_targets(task, options.targets(items, chosen))))
        bits = 8 * chosen.bytes / _weights(plan, options)
        points[chosen.picks] = Point(laid.folder_bytes, bits, chosen.loss, _counted(task, options, items, chosen))
    return list(points.values())


def _counted(task: Task, options: Candidates, items: Sequence[Item], chosen: Choice) -> dict[str, int]:
    """How many linears got each entry, in the order of the menu."""
    names = entries(task)
    counts: Counter[str] = Counter()
    for item, j in zip(items, chosen.picks, strict=True):
        counts[names[item.options[j].key]] += len(options.together[item.name])
    return {x: counts[x] for x in names if counts[x]}


def sentence(task: Task, options: Candidates, items: Sequence[Item], chosen: Choice) -> str:
    """Who got what, in a sentence."""
    named = ", ".join(f"{n} x {x}" for x, n in _counted(task, options, items, chosen).items())
    return f"{task.method.name} chose {named}; predicted KL divergence: {chosen.loss:.4f} nats."


def numbered(entries: int, options: Mapping[int, object], losses: Sequence[float]) -> tuple[float, ...]:
    """Losses at their numbers in the menu; 0 for entries that the linear cannot have, which nobody asks for."""
    values = dict(zip(options, losses, strict=True))
    return tuple(values.get(j, 0.0) for j in range(entries))
