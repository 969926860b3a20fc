"""What a compression takes first: tasks pooled by the ability that they ask for, and a task's items by category.

Perplexity falls little at 4 bits and, as studies found, so do most abilities; at 2 or 3 bits some are lost before
others, reasoning in several steps and in-context learning first (Liu et al. 2023, "Do emergent abilities exist in
quantized large language models", arXiv:2307.08072). And a model trained on another's answers may keep the style and
lose what it knows (Gudibande et al. 2023, "The false promise of imitating proprietary LLMs", arXiv:2305.15717): a win
rate on instructions says nothing about held-out tasks. So every ability is tested by itself.

Abilities of known data sets stand in known.yaml (language, common sense, knowledge, reading, reasoning); all others are
"other". The items of all tasks of one ability are pooled. Categories are those of the rows, by their field `category`
or `subject`. Each group has the exact paired test of its items, corrected over the groups beside it (Holm). Tasks
whose scores are not right or wrong are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lilliput.metrics import paired
from lilliput.metrics.interval import Interval
from lilliput.metrics.metric import Metric
from lilliput.metrics.paired import Flips

OTHER = "other"


@dataclass(frozen=True)
class Counts:
    """Items of a group and how many were right; base and flips None without a base model. tasks: those it is of."""

    name: str
    tasks: tuple[str, ...]
    items: int
    ours: int
    base: int | None
    flips: Flips | None


@dataclass(frozen=True)
class Group:
    """What a group of items shows; the fields are those of `lilliput.tasks.result.TaskResult`."""

    name: str
    tasks: tuple[str, ...]
    items: int
    ours: Interval
    base: Interval | None
    difference: Interval | None
    flips: Flips | None
    p_value: float | None
    p_holm: float | None
    level: str
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON: intervals as {value, low, high}, or null."""
        out = {k: v.to_json() if isinstance(v, Interval | Flips) else v for k, v in vars(self).items()}
        return out | {"tasks": list(self.tasks)}


def count(name: str, task: str, ours: Sequence[float], base: Sequence[float] | None) -> Counts:
    """Counts of items whose scores are 0 or 1, in the same order for both models."""
    right = [x == 1.0 for x in ours]
    if base is None:
        return Counts(name, (task,), len(ours), sum(right), None, None)
    theirs = [x == 1.0 for x in base]
    return Counts(name, (task,), len(ours), sum(right), sum(theirs), paired.flips(right, theirs))


def pooled(counts: Sequence[Counts]) -> list[Counts]:
    """One for each name, in the order in which names come first. All have a base, or none has."""
    names = dict.fromkeys(x.name for x in counts)
    return [_sum([x for x in counts if x.name == name]) for name in names]


def _sum(counts: Sequence[Counts]) -> Counts:
    bases = [x.base for x in counts if x.base is not None]
    flips = [x.flips for x in counts if x.flips is not None]
    items = sum(x.items for x in counts)
    return Counts(
        counts[0].name,
        tuple(dict.fromkeys(task for x in counts for task in x.tasks)),
        items,
        sum(x.ours for x in counts),
        sum(bases) if bases else None,
        Flips(items, sum(x.lost for x in flips), sum(x.won for x in flips)) if flips else None,
    )


def groups(counts: Sequence[Counts]) -> tuple[Group, ...]:
    """Each group's intervals and paired test, p-values corrected over all of them."""
    p_values = [None if x.flips is None else paired.mcnemar(x.flips.lost, x.flips.won) for x in counts]
    tested = [p for p in p_values if p is not None]
    corrected = iter(paired.holm(tested))
    rows = []
    for x, p in zip(counts, p_values, strict=True):
        p_holm = None if p is None else next(corrected)
        verdict = None if x.flips is None or p_holm is None else paired.verdict(x.flips, p_holm, tests=len(tested))
        rows.append(
            Group(
                x.name,
                x.tasks,
                x.items,
                paired.proportion(x.ours, x.items),
                None if x.base is None else paired.proportion(x.base, x.items),
                None if x.flips is None else paired.difference(x.flips),
                x.flips,
                p,
                p_holm,
                "none" if verdict is None else verdict.level,
                "not compared: no base model was given" if verdict is None else verdict.text,
            )
        )
    return tuple(rows)


def by_category(
    task: str, labels: Sequence[str], ours: Sequence[float], base: Sequence[float] | None
) -> tuple[Group, ...]:
    """A task's items by their label, in alphabetical order; nothing where there are fewer than two labels."""
    names = sorted(set(labels))
    if len(names) < 2:
        return ()
    counts = []
    for name in names:
        at = [i for i, label in enumerate(labels) if label == name]
        counts.append(
            count(name or OTHER, task, [ours[i] for i in at], None if base is None else [base[i] for i in at])
        )
    return groups(counts)


METRIC = Metric(
    how="lilliput eval DIR --against MODEL --tasks lambada=FILE.jsonl,piqa=FILE.jsonl,gsm8k=TEST.jsonl+TRAIN.jsonl",
    key="abilities[].difference, tasks[].categories",
    unit="share of items",
    interval="score interval; paired, Bonett and Price",
    covers=("ptq-empirical", "emergent-quant", "false-promise"),
)
