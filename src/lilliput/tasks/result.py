"""From the scores of items to rows of a report: intervals, paired tests, a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lilliput.metrics import paired
from lilliput.metrics.interval import Interval, exp_interval
from lilliput.metrics.paired import Flips
from lilliput.tasks.abilities import OTHER, Counts, Group, by_category, groups, pooled

LOG_LIKELIHOOD = "log_likelihood"

Scores = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Scored:
    """One task's items scored by one or two models, in the same order.

    metric: the one that is tested; ours, base: metric -> score of each item; source: the file or the harness; ability:
    what the task asks for; categories: of each item, nothing where none is known.
    """

    name: str
    kind: str
    metric: str
    shots: int
    source: str
    fingerprint: str
    ours: Scores
    base: Scores | None
    notes: tuple[str, ...] = ()
    ability: str = OTHER
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskResult:
    """What a task shows. Comparisons are None where there was no base model.

    metric: the one that is tested; ours, base: its mean over items; difference: ours less base, paired; flips: items
    that turned right or wrong; p_value: exact McNemar (sign flips where scores are not right or wrong); p_holm: the
    same corrected over the tasks of the run; detectable: the smallest loss that the sample would have shown with 80 %
    probability at the corrected level, None where it could show none; level: ok, loss, gain, unsure or none; verdict:
    the same in words; also: other metrics, each with ours, base and difference (for perplexity ratio); ability,
    categories: see `lilliput.tasks.abilities`.
    """

    name: str
    kind: str
    items: int
    metric: str
    shots: int
    source: str
    fingerprint: str
    ours: Interval
    base: Interval | None
    difference: Interval | None
    flips: Flips | None
    p_value: float | None
    p_holm: float | None
    detectable: float | None
    level: str
    verdict: str
    also: Mapping[str, Mapping[str, Interval]]
    notes: tuple[str, ...]
    ability: str
    categories: tuple[Group, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON: intervals as {value, low, high}, or null."""
        out: dict[str, Any] = dict(vars(self))
        for key, value in out.items():
            if isinstance(value, Interval | Flips):
                out[key] = value.to_json()
        out["also"] = {name: {k: v.to_json() for k, v in of.items()} for name, of in self.also.items()}
        out["notes"] = list(self.notes)
        out["categories"] = [x.to_json() for x in self.categories]
        return out


def _is_binary(values: Sequence[float]) -> bool:
    return all(x in (0.0, 1.0) for x in values)


def _level(values: Sequence[float]) -> Interval:
    if _is_binary(values):
        return paired.proportion(round(sum(values)), len(values))
    if len(values) < 2:
        return Interval(values[0], -float("inf"), float("inf"))
    return paired.bootstrap(torch.tensor(values, dtype=torch.float64))


def _flips(ours: Sequence[float], base: Sequence[float]) -> Flips | None:
    if not _is_binary(ours) or not _is_binary(base):
        return None
    return paired.flips([x == 1.0 for x in ours], [x == 1.0 for x in base])


def _compared(ours: Sequence[float], base: Sequence[float]) -> Interval:
    flips = _flips(ours, base)
    if flips is not None:
        return paired.difference(flips)
    return _level([a - b for a, b in zip(ours, base, strict=True)])


def _perplexity(ours: Sequence[float], base: Sequence[float] | None) -> dict[str, Interval]:
    a = torch.tensor(ours, dtype=torch.float64)
    intervals = {"ours": exp_interval(-a)}
    if base is not None:
        b = torch.tensor(base, dtype=torch.float64)
        intervals |= {"base": exp_interval(-b), "ratio": exp_interval(b - a)}
    return intervals


def _also(scored: Scored) -> dict[str, dict[str, Interval]]:
    intervals: dict[str, dict[str, Interval]] = {}
    for name, ours in scored.ours.items():
        base = None if scored.base is None else scored.base[name]
        if name == LOG_LIKELIHOOD:
            if len(ours) > 1:
                intervals["perplexity"] = _perplexity(ours, base)
        elif name != scored.metric:
            intervals[name] = {"ours": _level(ours)}
            if base is not None:
                intervals[name] |= {"base": _level(base), "difference": _compared(ours, base)}
    return intervals


def _p_value(scored: Scored) -> float | None:
    if scored.base is None:
        return None
    ours, base = scored.ours[scored.metric], scored.base[scored.metric]
    flips = _flips(ours, base)
    if flips is not None:
        return paired.mcnemar(flips.lost, flips.won)
    return paired.sign_flip(torch.tensor(ours, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64))


def _verdict(flips: Flips | None, interval: Interval | None, p_holm: float | None, tests: int) -> tuple[str, str]:
    if interval is None or p_holm is None:
        return "none", "not compared: no base model was given"
    if flips is not None:
        verdict = paired.verdict(flips, p_holm, tests=tests)
        return verdict.level, verdict.text
    amount = f"{abs(interval.value):.3g} +- {(interval.high - interval.low) / 2:.2g}"
    if p_holm < paired.ALPHA:
        return ("loss", f"loss of {amount}") if interval.value < 0 else ("gain", f"gain of {amount}")
    return "unsure", f"no significant difference ({interval.low:.3g} to {interval.high:.3g})"


def _categories(scored: Scored) -> tuple[Group, ...]:
    ours, base = scored.ours[scored.metric], None if scored.base is None else scored.base[scored.metric]
    if not _is_binary(ours) or (base is not None and not _is_binary(base)):
        return ()
    return by_category(scored.name, scored.categories, ours, base)


def abilities(rows: Sequence[TaskResult]) -> tuple[Group, ...]:
    """The tasks that were compared and whose items are right or wrong, pooled by ability."""
    counts = [
        Counts(x.ability, (x.name,), x.items, round(x.ours.value * x.items), round(x.base.value * x.items), x.flips)
        for x in rows
        if x.base is not None and x.flips is not None
    ]
    return groups(pooled(counts))


def results(scored: Sequence[Scored]) -> list[TaskResult]:
    """Rows of a report, in the given order, with p-values corrected over all of them (Holm)."""
    p_values = [_p_value(x) for x in scored]
    tested = [p for p in p_values if p is not None]
    corrected = iter(paired.holm(tested))
    alpha = paired.ALPHA / max(1, len(tested))  # the level that Holm's procedure begins with
    rows = []
    for x, p in zip(scored, p_values, strict=True):
        ours = x.ours[x.metric]
        base = None if x.base is None else x.base[x.metric]
        flips = None if base is None else _flips(ours, base)
        compared = None if base is None else _compared(ours, base)
        p_holm = None if p is None else next(corrected)
        level, words = _verdict(flips, compared, p_holm, len(tested))
        rows.append(
            TaskResult(
                name=x.name,
                kind=x.kind,
                items=len(ours),
                metric=x.metric,
                shots=x.shots,
                source=x.source,
                fingerprint=x.fingerprint,
                ours=_level(ours),
                base=None if base is None else _level(base),
                difference=compared,
                flips=flips,
                p_value=p,
                p_holm=p_holm,
                detectable=None if flips is None else paired.detectable(flips.items, flips.discordant, alpha),
                level=level,
                verdict=words,
                also=_also(x),
                notes=x.notes,
                ability=x.ability,
                categories=_categories(x),
            )
        )
    return rows
