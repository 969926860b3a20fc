"""Whether two models that answered the same items differ, how much, and what the sample could have shown.

Items are right or wrong for each model, so all that counts are the items on which the two disagree: `lost` (the base
right, ours wrong) and `won` (the other way round). McNemar's exact test asks whether these are equally likely (McNemar
1947, doi:10.1007/BF02295996). Everything else is compared by the mean of the paired differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from lilliput.errors import DataError
from lilliput.metrics.interval import LEVEL, Interval, clip

ALPHA = 0.05
POWER = 0.8
MARGIN = 0.02  # a loss of two points is what a user should not miss
SAMPLES = 10_000
_Z = 1.959963984540054
_MOST_ITEMS = 1 << 24
# The number of disagreements is itself random; this many of its values stand for all.
_GRID = 64


@dataclass(frozen=True)
class Flips:
    """Items on which two models disagree. lost: right to wrong, seen from the base; won: wrong to right."""

    items: int
    lost: int
    won: int

    @property
    def difference(self) -> float:
        """Share of right items of ours less that of the base."""
        return (self.won - self.lost) / self.items

    @property
    def discordant(self) -> float:
        """Share of items on which they disagree; one added to each kind, so that none seen does not mean none (Bonett
        & Price 2012)."""
        return (self.lost + self.won + 2) / (self.items + 2)

    def to_json(self) -> dict[str, int]:
        return {"right_to_wrong": self.lost, "wrong_to_right": self.won}


def flips(ours: Sequence[bool], base: Sequence[bool]) -> Flips:
    """Counts over items in the same order. Raises DataError for no items or lists of different length."""
    if len(ours) != len(base) or not ours:
        raise DataError(f"{len(ours)} and {len(base)} answers: paired tests need the same items, at least one.")
    lost = sum(b and not a for a, b in zip(ours, base, strict=True))
    won = sum(a and not b for a, b in zip(ours, base, strict=True))
    return Flips(len(ours), lost, won)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value: whether `lost` of lost + won tosses is what a fair coin gives."""
    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def proportion(right: int, items: int) -> Interval:
    """Share right/items with its 95 % score interval (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    share = right / items
    interval = stats.binomtest(right, items).proportion_ci(LEVEL, method="wilson")
    return Interval(share, min(share, float(interval.low)), max(share, float(interval.high)))


def difference(counts: Flips) -> Interval:
    """Paired difference of two shares with its 95 % interval: Wald's with one item added to each kind of disagreement.

    Unlike Wald's and the bootstrap's it does not shrink to a point where no item flipped (Bonett & Price 2012,
    doi:10.3102/1076998611411915). Of such intervals scipy has none.
    """
    lost, won = ((x + 1) / (counts.items + 2) for x in (counts.lost, counts.won))
    half = _Z * math.sqrt(max(0.0, lost + won - (won - lost) ** 2) / (counts.items + 2))
    centre, middle = counts.difference, won - lost
    return clip(Interval(centre, min(centre, middle - half), max(centre, middle + half)), -1.0, 1.0)


def bootstrap(values: Tensor, *, seed: int = 0, samples: int = SAMPLES) -> Interval:
    """Mean of values [items] (any float dtype) with its 95 % percentile bootstrap interval (Efron 1979).

    For skewed quantities over many items; for few of them `interval.mean_interval` (Student's t) is right. Pass paired
    differences to compare two models. Raises DataError for fewer than two items.
    """
    count = values.numel()
    if count < 2:
        raise DataError(f"{count} item gives no interval: evaluate at least 2 items.")
    flat = values.to(torch.float64).flatten().numpy()
    if not np.ptp(flat):  # scipy warns of equal values, whose interval is a point
        return Interval(float(flat[0]), float(flat[0]), float(flat[0]))
    result = stats.bootstrap(
        (flat,),
        np.mean,
        n_resamples=samples,
        batch=_batch(count),
        confidence_level=LEVEL,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(flat.mean()), float(result.low), float(result.high))


def sign_flip(differences: Tensor, *, seed: int = 0, samples: int = SAMPLES) -> float:
    """Two-sided p-value of paired differences [items]: the share of sign patterns with as large a mean.

    For scores that are not right or wrong. All patterns where there are fewer than `samples`, else random ones, the one
    at hand counting as well (Phipson & Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    flat = differences.to(torch.float64).flatten().numpy()
    result = stats.permutation_test(
        (flat,),
        lambda values, axis: np.abs(values.mean(axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=samples,
        batch=_batch(flat.size),
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _batch(count: int) -> int:
    """Draws of `count` items to make at once: all of them would take samples x items x 8 bytes."""
    return max(1, (1 << 22) // max(1, count))


def _rejects(count: int, share: float, alpha: float) -> float:
    """Probability that the exact test rejects on `count` disagreements of which each is a loss with `share`."""
    last = int(stats.binom.ppf(alpha / 2, count, 0.5))  # the largest rejected min(lost, won), or one more
    last -= 2 * stats.binom.cdf(last, count, 0.5) > alpha
    if last < 0:
        return 0.0
    return min(1.0, float(stats.binom.cdf(last, count, share) + stats.binom.sf(count - last - 1, count, share)))


def power(items: int, discordant: float, loss: float, alpha: float = ALPHA) -> float:
    """Probability that McNemar's exact test finds a loss (share of items, 0 < loss <= 1) on that many items.

    discordant: share of items on which the models disagree; at least the loss. The test's own power, averaged over the
    number of disagreements (at most 64 of its values, weighted).
    """
    share = min(1.0, max(discordant, loss))
    if share >= 1.0:
        counts, weights = np.array([items]), np.array([1.0])
    else:
        spread = 5 * math.sqrt(items * share * (1 - share)) + 1
        low, high = max(0, math.floor(items * share - spread)), min(items, math.ceil(items * share + spread))
        counts = np.unique(np.linspace(low, high, min(_GRID, high - low + 1)).round().astype(int))
        weights = stats.binom.pmf(counts, items, share)
        weights /= weights.sum()
    toward = (1 + loss / share) / 2
    return float(sum(w * _rejects(int(c), toward, alpha) for c, w in zip(counts, weights, strict=True)))


def detectable(items: int, discordant: float, alpha: float = ALPHA) -> float | None:
    """The smallest loss, as a share of items, that this sample would have shown with 80 % probability.

    None where even a loss on every item would not have been found.
    """
    if power(items, 1.0, 1.0, alpha) < POWER:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if power(items, discordant, middle, alpha) >= POWER else (middle, high)
    return high


def items_needed(discordant: float, loss: float = MARGIN, alpha: float = ALPHA) -> int:
    """About how many items show a loss of that share with 80 % probability: two significant digits, rounded up."""
    low, high = 0, 1
    while power(high, discordant, loss, alpha) < POWER:
        low, high = high, high * 2
        if high > _MOST_ITEMS:
            raise ValueError(f"a loss of {loss} is too small for any sample")
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, discordant, loss, alpha) >= POWER else (middle, high)
    step = int("1" + "0" * max(0, len(str(high)) - 2))
    return -(-high // step) * step


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the given order (Holm 1979, doi:10.2307/4615733).

    scipy corrects for false discoveries only, which promises less.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


@dataclass(frozen=True)
class Verdict:
    """level: ok, loss, gain or unsure; text: the same in words."""

    level: str
    text: str


def verdict(counts: Flips, p_corrected: float, *, tests: int = 1, margin: float = MARGIN) -> Verdict:
    """What the flips show, in words, at 5 % over all `tests`.

    A difference that is not significant is "no detectable loss" only where a loss of `margin` would have been found
    with 80 % probability, or where the interval excludes it; otherwise the sample was too small, and the verdict says
    how many items would do.
    """
    interval = difference(counts)
    points = f"{100 * abs(interval.value):.1f} +- {50 * (interval.high - interval.low):.1f} points"
    if p_corrected < ALPHA:
        return Verdict("loss", f"loss of {points}") if interval.value < 0 else Verdict("gain", f"gain of {points}")
    alpha = ALPHA / tests
    if interval.low > -margin or power(counts.items, counts.discordant, margin, alpha) >= POWER:
        return Verdict("ok", "no detectable loss")
    needed = items_needed(counts.discordant, margin, alpha)
    return Verdict("unsure", f"underpowered: run {needed} items to see a loss of {100 * margin:g} points")
