"""May this model be shipped? One word, one sentence and the reasons, from the figures of an evaluation.

The rules, in order; the first that holds decides. Figures of several data sets count by the worst of them.

1. **bad**: a gate is missed, a tensor is suspected to be damaged, or the paired perplexity ratio is above 1.25 with
   certainty (the low end of its interval).
2. **unsure**: no ratio was measured (nothing to compare with).
3. **loss**: the ratio is above 1 with certainty and may reach 1.01; or a task lost with significance; or the KL
   divergence is above 0.05 nats with certainty, which a perplexity that stays the same can hide.
4. **ok**: every ratio is below 1.01 with certainty (the high end of its interval). A loss that is certain and smaller
   than that is named in the reasons.
5. **unsure**: the intervals are too wide for either. The number of further windows that would settle it is estimated
   from the spread at hand: the interval shrinks with the square root of their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.metrics.interval import t_quantile
from lilliput.units import size

Data = Mapping[str, Any]
BAD_RATIO = 1.25
OK_RATIO = 1.01
SAME_KL = 0.05  # nats
LEVELS = ("ok", "unsure", "loss", "bad")
_MOST = 100_000  # windows; nobody runs more


def measured(evidence: Data) -> list[Data]:
    """The data sets of an evaluation, worst first: by the low end of the perplexity ratio, those without one last."""
    rows: Sequence[Data] = (evidence.get("quality") or {}).get("data") or ()
    ratios = [row.get("perplexity_ratio") for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -(ratios[i] or {"low": -math.inf})["low"])
    return [rows[i] for i in order]


def verdict(evidence: Data) -> dict[str, Any]:
    """{"level": one of LEVELS, "headline": one sentence, "reasons": sentences}, by the rules of this module."""
    data = [row for row in measured(evidence) if row.get("perplexity_ratio")]
    bad = _bad(evidence, data)
    if bad:
        reasons = [sentence for _, sentence in bad]
        return _answer("bad", f"Do not ship this: {bad[0][0]}.", reasons + _facts(evidence, data))
    if not data:
        return _answer("unsure", "Not compared with an original, so nothing is known about a loss.", _alone(evidence))
    facts = _facts(evidence, data)
    ratios = [row["perplexity_ratio"] for row in data]
    ratio = next((x for x in ratios if x["low"] > 1 and x["high"] >= OK_RATIO), None)
    if ratio is not None:
        return _answer("loss", f"Perplexity rises by {span(ratio)}{_gain(evidence)}.", facts)
    tasks = [row for row in evidence.get("tasks") or () if row.get("level") == "loss"]
    if tasks:
        names = ", ".join(str(row["name"]) for row in tasks)
        return _answer("loss", f"A loss on {names}, although perplexity shows none{_gain(evidence)}.", facts)
    changed = [row for row in data if (row.get("kl") or {"low": 0.0})["low"] > SAME_KL]
    if changed:
        headline = "Perplexity is unchanged, but predictions differ: a KL divergence of "
        return _answer("loss", f"{headline}{changed[0]['kl']['value']:.2g} nats.", facts)
    if all(x["high"] < OK_RATIO for x in ratios):
        worst = max(ratios, key=lambda x: float(x["high"]))
        most = "no higher" if worst["high"] <= 1 else f"higher by at most {percent(worst['high'] - 1)}"
        return _answer("ok", f"No loss worth mentioning: perplexity is {most}{_gain(evidence)}.", facts)
    open_rows = [row for row in data if row["perplexity_ratio"]["high"] >= OK_RATIO]
    more = max((further_windows(row["perplexity_ratio"], int(row["windows"])) for row in open_rows), default=0)
    settle = f"about {more:,} more windows would settle it" if more < _MOST else "more text will hardly settle it"
    wide = max((x for x in ratios if x["high"] >= OK_RATIO), key=lambda x: float(x["high"]) - float(x["low"]))
    span_of = f"between {signed(wide['low'] - 1)} and {signed(wide['high'] - 1)}"
    return _answer("unsure", f"Not settled: perplexity changes by {span_of}; {settle}.", facts)


def check_gates(
    evidence: Data,
    max_kl: float | None = None,
    max_ppl_increase: float | None = None,
    min_agreement: float | None = None,
) -> list[dict[str, Any]]:
    """One row for each stated limit: {"name", "limit", "value", "passed", "data"}.

    max_kl in nats; max_ppl_increase as a share (0.05: at most 5 % more than the original); min_agreement as a share.
    The value is the worst over the data sets, whose name is in "data". A figure that was not measured does not pass:
    its value is None.
    """
    stated = (
        ("--max-kl", max_kl, "kl", 0.0, 1),
        ("--max-ppl-increase", max_ppl_increase, "perplexity_ratio", 1.0, 1),
        ("--min-agreement", min_agreement, "agreement", 0.0, -1),
    )
    rows = []
    for name, limit, key, origin, sign in stated:
        if limit is None:
            continue
        values = [(row[key]["value"] - origin, str(row.get("name"))) for row in measured(evidence) if row.get(key)]
        value, data = max(values, key=lambda x: sign * x[0], default=(None, None))
        passed = value is not None and sign * value <= sign * limit
        rows.append({"name": name, "limit": limit, "value": value, "passed": passed, "data": data})
    return rows


def further_windows(ratio: Data, windows: int) -> int:
    """Windows beyond `windows` until the interval of `ratio` excludes 1 or 1.01, if its value stays; 1 to 100,000.

    The half width on the log scale is t(n - 1) s / sqrt(n), with the spread s that the present interval implies.
    """
    middle = math.log(ratio["value"])
    half = (math.log(ratio["high"]) - math.log(ratio["low"])) / 2
    goal = max(middle, math.log(OK_RATIO) - middle)
    if half <= goal:
        return 1
    spread = half * math.sqrt(windows) / t_quantile(windows - 1)

    def enough(n: int) -> bool:
        return t_quantile(n - 1) * spread / math.sqrt(n) <= goal

    low, high = windows, windows * 2
    while not enough(high):
        low, high = high, high * 2
        if high > _MOST:
            return _MOST
    while high - low > 1:
        middle_n = (low + high) // 2
        low, high = (low, middle_n) if enough(middle_n) else (middle_n, high)
    return high - windows


def percent(share: float) -> str:
    """0.052 as "5.2 %", two significant digits below 10 %."""
    value = 100 * share
    return f"{value:.0f} %" if abs(value) >= 10 else f"{value:.2g} %"


def signed(share: float) -> str:
    return f"{'+' if share >= 0 else '−'}{percent(abs(share))}"


def span(ratio: Data) -> str:
    """A ratio above 1 as a rise: "5.2 % (4.7 % to 5.8 %)"."""
    value, low, high = (percent(ratio[key] - 1) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _answer(level: str, headline: str, reasons: Sequence[str]) -> dict[str, Any]:
    return {"level": level, "headline": headline, "reasons": list(reasons)}


def _gain(evidence: Data) -> str:
    ratio = (evidence.get("size") or {}).get("compression_ratio")
    return f", for a model {ratio:.2g} times smaller" if ratio and ratio > 1 else ""


def _bad(evidence: Data, data: Sequence[Data]) -> list[tuple[str, str]]:
    """What forbids shipping: in short for the headline, and as a sentence."""
    reasons = []
    for row in (evidence.get("loss") or {}).get("suspects") or ():
        factor = f" (off by a factor of {row['factor']:.3g})" if row.get("factor") is not None else ""
        reasons.append((f"{row['tensor']} looks damaged", f"{row['tensor']}: {row['reason']}{factor}."))
    for gate in evidence.get("gates") or ():
        if not gate["passed"]:
            value = "was not measured" if gate["value"] is None else f"is {gate['value']:.4g}"
            sentence = f"the gate {gate['name']} {gate['limit']:.4g} is missed: it {value}"
            reasons.append((sentence, f"T{sentence[1:]}."))
    for row in data:
        ratio = row["perplexity_ratio"]
        if ratio["low"] > BAD_RATIO:
            sentence = f"perplexity on {row['name']} is {ratio['value']:.3g} times the original's"
            why = (
                f"On {row['name']} the low end of the interval, {ratio['low']:.3g}, lies above the limit, {BAD_RATIO}."
            )
            reasons.append((sentence, why))
    return reasons


def _facts(evidence: Data, data: Sequence[Data]) -> list[str]:
    """What supports the headline, in sentences."""
    facts = []
    for row in data:
        ratio = row["perplexity_ratio"]
        change = f"{signed(ratio['value'] - 1)}, between {signed(ratio['low'] - 1)} and {signed(ratio['high'] - 1)}"
        facts.append(f"Perplexity on {row['name']}: {change} (95 %, {row['windows']} windows).")
    for row in evidence.get("tasks") or ():
        if row.get("level") == "loss":
            facts.append(f"{row['name']}: {row['verdict']}.")
    part = evidence.get("size") or {}
    if part.get("bytes") and part.get("base_bytes"):
        now, before = size(part["bytes"]), size(part["base_bytes"])
        facts.append(f"No smaller on disk: {now}." if now == before else f"{now} instead of {before} on disk.")
    return facts


def _alone(evidence: Data) -> list[str]:
    facts = [
        f"Perplexity on {row['name']}: {row['perplexity']['value']:.4g}."
        for row in measured(evidence)
        if row.get("perplexity")
    ]
    return [*facts, "Give the original with --against to measure what was lost."]
