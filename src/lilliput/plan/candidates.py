"""What there is to choose from, linear by linear and cache by cache, and what is said of a choice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lilliput import units
from lilliput.budget import menu
from lilliput.budget.choice import Choice, Item, Option
from lilliput.plan.contexts import Context
from lilliput.plan.plan import Plan
from lilliput.plan.resolve import Resolved
from lilliput.target import Target
from lilliput.verbs.choose import Choose
from lilliput.verbs.scores import Scores
from lilliput.verbs.spec import Task

_DEAREST = 3  # items that are named


@dataclass(frozen=True)
class Candidates:
    """By linear, in order: the entries of the menu that it can have, by number, with their targets and bytes."""

    options: Mapping[str, Mapping[int, tuple[Target, int]]]
    together: Mapping[str, tuple[str, ...]]  # what shares one entry, by the name of the item
    context: Context | None = None  # with what may be chosen for keys and values

    def items(self, losses: Scores | None = None) -> list[Item]:
        """What is chosen among; without losses all are 0."""
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
                            0.0 if losses is None else math.fsum(losses[name][j] for name in names),
                        )
                        for j in sorted(shared)
                    ),
                )
            )
        return [*items, *(() if self.context is None else self.context.items(losses))]

    def targets(self, items: Sequence[Item], chosen: Choice) -> dict[str, Target]:
        """By linear, what was chosen."""
        picked = keys(items, chosen)
        return {name: self.options[name][picked[key]][0] for key, names in self.together.items() for name in names}

    def resolved(self, plan: Resolved, task: Task, items: Sequence[Item], chosen: Choice) -> Resolved:
        """What the step makes of a resolved recipe with a choice."""
        decided = plan.with_targets(task, self.targets(items, chosen))
        return decided if self.context is None else decided.with_steps(self.context.steps(keys(items, chosen)))


def keys(items: Sequence[Item], chosen: Choice) -> dict[str, int]:
    """The keys of the options that were chosen, by item."""
    return {x.name: x.options[j].key for x, j in zip(items, chosen.picks, strict=True)}


def counted(task: Task, pool: Candidates, items: Sequence[Item], chosen: Choice) -> dict[str, int]:
    """How many linears got each entry, in the order of the menu; a type that narrow rows have in place of an entry is
    called by its own name."""
    menu_entries = task.of(Choose).entries(task.options)
    counts: Counter[tuple[int, str]] = Counter()
    picked = keys(items, chosen)
    for item, names in pool.together.items():
        key = picked[item]
        for name in names:
            wanted, form = menu_entries[key], pool.options[name][key][0].format
            counts[key, wanted if menu.fields(wanted)["format"] == form else form] += 1
    counted: dict[str, int] = {}
    for (_, name), count in sorted(counts.items()):
        counted[name] = counted.get(name, 0) + count
    return counted


def sentence(plan: Plan, task: Task, pool: Candidates, items: Sequence[Item], chosen: Choice, kl: float) -> str:
    """Who got what, and what decided: bits by role, and whose error costs most."""
    named = ", ".join(f"{n} x {x}" for x, n in counted(task, pool, items, chosen).items())
    picked = {x.name: x.options[j] for x, j in zip(items, chosen.picks, strict=True)}
    bits: dict[str, list[int]] = {}
    for item, names in pool.together.items():
        for x in (y for y in plan.resolved.planned if y.name in names):
            total = bits.setdefault(x.linear.role, [0, 0])
            total[0] += 8 * pool.options[x.name][picked[item].key][1]
            total[1] += x.linear.parameters
    roles = ", ".join(f"{role} {size / count:.2f}" for role, (size, count) in bits.items())
    dear = sorted(picked, key=lambda name: -picked[name].loss)[:_DEAREST]
    most = ", ".join(f"{name} {picked[name].loss:.4f}" for name in dear)
    return (
        f"{task.method.name} chose {named}; predicted KL divergence: {kl:.4f} nats. Bits of a weight by role: {roles}. "
        f"{_stored(pool.context, keys(items, chosen))}What still costs most by itself, in nats: {most}."
    )


def _stored(context: Context | None, picked: Mapping[str, int]) -> str:
    """How blocks store keys and values; "" where nothing was chosen for them."""
    if context is None or not context.choosing:
        return ""
    taken = context.plain_bytes + sum(x.sizes[picked[x.name]] - context.plain[x.block] for x in context.choosing)
    named = ", ".join(f"{n} x {name}" for name, n in context.counts(picked).items())
    return (
        f"Keys and values of {context.tokens} tokens take {units.size(taken)} in place of "
        f"{units.size(context.plain_bytes)}: {named}. "
    )
