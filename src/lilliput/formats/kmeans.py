"""Weighted k-means in one dimension, many units at once: the levels of a codebook.

Minimises sum_j h_j (v_j - c(v_j))^2 for each unit, c(v) the nearest of k levels. In one dimension a cluster is an
interval: the values are sorted once, and prefix sums of h and h v give each interval's weight and mean, so that a
step of Lloyd's algorithm (1982, IEEE Trans. Inf. Theory 28) costs O(units * k * log n) and is exact.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

ITERATIONS = 20
_FEW = 6  # steps that tell which of two ways is better
_MOVES = 2  # levels of a unit that may be moved to where they are worth more
_HOPE = 0.3  # of its cost, what a move has to gain before the other levels follow
_SPLITS = 16  # places for a split that are tried for each level, on average
_CHUNK = 1 << 16  # values worked on at a time
_BYTES = 150  # that each takes meanwhile (measured)


def fit(
    values: Tensor,
    levels: int,
    *,
    weights: Tensor | None = None,
    zero: Tensor | None = None,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Levels float32 [units, levels] in ascending order, for finite values [units, n].

    `weights` [units, n] or [n], not negative, are the h_j; None, or nothing but zeros in a unit, counts all alike.
    `zero`, bool [units]: units of which one level has to be exactly 0.

    Two starts, both on values of the unit: quantiles of h, and quantiles of h^(1/3) |gap|^(2/3), the density that is
    best for many levels (Panter and Dite 1951). Each goes a few steps down, and the better is taken. From there, as
    long as that helps, the two neighbouring clusters that lose the least are merged, the freed level splits the cluster
    that gains the most, and all go a few steps down; at last, until nothing moves, for `iterations` steps at most. The
    weighted squared error never rises; a level that loses all its values stays. A unit with no more distinct values
    than levels keeps them exactly; levels that are left over repeat the largest.
    """
    units, n = values.shape
    out = torch.empty(units, levels, device=values.device)
    if n == 0:
        return out.zero_()
    step = max(1, _CHUNK // n)
    for a in range(0, units, step):
        b = min(a + step, units)
        some = weights if weights is None or weights.dim() == 1 else weights[a:b]
        pinned = None if zero is None else zero[a:b]
        out[a:b] = _fit(values[a:b].double(), levels, some, pinned, iterations)
    return out


def scratch(unit: int, values: int) -> int:
    """Bytes that `fit` works in for so many values in units of `unit`; a unit is never cut."""
    return _BYTES * min(max(_CHUNK, unit), values)


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Index int64 [units, n] of the level nearest to each value; levels [units, k] ascend. Ties go to the smaller."""
    bounds = (levels[:, 1:] + levels[:, :-1]) / 2
    return torch.searchsorted(bounds.contiguous(), values.contiguous())


class _Sorted:
    """Units of sorted values with their prefix sums."""

    def __init__(self, values: Tensor, weights: Tensor | None) -> None:
        self.values, order = values.sort(dim=1)
        if weights is None:
            self.weights = torch.ones_like(values)
        else:
            mass = weights.double().expand(values.shape)
            top = mass.amax(1, keepdim=True)
            mass = torch.where(top > 0, mass / top, 1.0)  # relative, so that equal weights are exactly none
            self.weights = mass.gather(1, order)
        self.mass = _prefix(self.weights)
        self.moment = _prefix(self.weights * self.values)

    def sums(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and weighted sum of the values nearest to each level, [units, k]."""
        bounds = (levels[:, 1:] + levels[:, :-1]) / 2
        places = torch.searchsorted(self.values, bounds, right=True)
        return _between(self.mass, places), _between(self.moment, places)

    def error(self, levels: Tensor) -> Tensor:
        """Weighted squared error of each unit, but for a constant of the unit."""
        mass, moment = self.sums(levels)
        return (levels * (levels * mass - 2 * moment)).sum(1)

    def descend(self, levels: Tensor, fixed: Tensor | None, iterations: int) -> Tensor:
        for _ in range(iterations):
            mass, moment = self.sums(levels)
            centres = torch.where(mass > 0, moment / mass, levels)
            if fixed is not None:
                centres = torch.where(fixed, levels, centres)
            # Means of neighbouring intervals are in order but for the last bits.
            centres = centres.cummax(1).values
            if torch.equal(centres, levels):
                break
            levels = centres
        return levels

    def of(self, units: Tensor) -> _Sorted:
        """Some of the units."""
        some = copy(self)
        some.values, some.weights = self.values[units], self.weights[units]
        some.mass, some.moment = self.mass[units], self.moment[units]
        return some

    def with_move(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Levels with one moved by a merge and a split, and bool [units]: where that may lower the error.

        A split that gains a little less than the merge costs may still pay once all levels have followed, so that
        splits are tried after some values only.
        """
        count = self.values.shape[1]
        every = max(1, count // (_SPLITS * levels.shape[1]))
        bounds = (levels[:, 1:] + levels[:, :-1]) / 2
        label = torch.searchsorted(bounds.contiguous(), self.values[:, every - 1 :: every].contiguous())
        places = torch.searchsorted(self.values, bounds, right=True)
        first = torch.nn.functional.pad(places, (1, 0))
        last = torch.nn.functional.pad(places, (0, 1), value=count)
        before, so_far = self.mass[:, every::every], self.moment[:, every::every]
        mass = [before - self.mass.gather(1, first).gather(1, label)]
        mass.append(self.mass.gather(1, last).gather(1, label) - before)
        means = [so_far - self.moment.gather(1, first).gather(1, label)]
        means.append(self.moment.gather(1, last).gather(1, label) - so_far)
        means = [torch.where(m > 0, s / m, levels.gather(1, label)) for s, m in zip(means, mass, strict=True)]
        gain, at = _between_means(mass, means).max(1, keepdim=True)
        split = label.gather(1, at)
        whole, moment = self.sums(levels)
        centre = torch.where(whole > 0, moment / whole, levels)
        cost = _between_means([whole[:, :-1], whole[:, 1:]], [centre[:, :-1], centre[:, 1:]])
        pair = torch.arange(cost.shape[1], device=cost.device)
        cost = torch.where((pair == split) | (pair + 1 == split), torch.inf, cost)
        least, merged = cost.min(1, keepdim=True)
        both = whole.gather(1, merged) + whole.gather(1, merged + 1)
        sums = moment.gather(1, merged) + moment.gather(1, merged + 1)
        out = levels.scatter(1, merged, torch.where(both > 0, sums / both, levels.gather(1, merged)))
        out = out.scatter(1, merged + 1, means[1].gather(1, at)).scatter(1, split, means[0].gather(1, at))
        return out.sort(1).values, (gain > _HOPE * least).squeeze(1)


def _fit(values: Tensor, k: int, weights: Tensor | None, zero: Tensor | None, iterations: int) -> Tensor:
    data = _Sorted(values, weights)
    fresh = torch.ones_like(data.values, dtype=torch.bool)
    fresh[:, 1:] = data.values[:, 1:] != data.values[:, :-1]
    rank = fresh.cumsum(1) - 1
    distinct = rank[:, -1:] + 1
    unique = torch.zeros_like(data.values).scatter_(1, rank, data.values)  # the distinct values, first in each row
    gap = torch.zeros_like(data.values)
    gap[:, 1:] = data.values[:, 1:] - data.values[:, :-1]
    few = min(iterations, _FEW)
    best = data.descend(_start(data.weights, rank, distinct, unique, k), None, few)
    spread = (data.weights * gap * gap).pow(1 / 3)
    other = data.descend(_start(spread, rank, distinct, unique, k), None, few)
    best = torch.where((data.error(other) < data.error(best))[:, None], other, best)
    active = torch.arange(len(best), device=best.device)
    for _ in range(_MOVES if k > 2 else 0):
        some = data.of(active)
        levels, worth = some.with_move(best[active])
        active, levels, some = active[worth], levels[worth], some.of(worth)
        if not len(active):
            break
        levels = some.descend(levels, None, few)
        better = some.error(levels) < some.error(best[active])
        active = active[better]
        best[active] = levels[better]
    best = data.descend(best, None, iterations)
    if zero is not None:
        fixed = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.abs().argmin(1, keepdim=True), True)
        fixed &= zero[:, None]
        best = data.descend(torch.where(fixed, 0.0, best).sort(1).values, fixed, iterations)
    index = torch.arange(k, device=values.device).expand(len(values), k)
    exact = unique.gather(1, torch.minimum(index, distinct - 1))
    return torch.where(distinct <= k, exact, best).float()


def _start(density: Tensor, rank: Tensor, distinct: Tensor, unique: Tensor, k: int) -> Tensor:
    """Values [units, k] at the middles of k equal shares of `density`, all of them distinct where there are enough."""
    shares = density.cumsum(1)
    at = (torch.arange(k, device=density.device) + 0.5) / k * shares[:, -1:]
    places = torch.searchsorted(shares, at.contiguous()).clamp_(max=density.shape[1] - 1)
    number = torch.arange(k, device=density.device)
    ranks = (rank.gather(1, places) - number).cummax(1).values + number
    ranks = torch.minimum(ranks, distinct - k + number).clamp_(min=0)
    return unique.gather(1, torch.minimum(ranks, distinct - 1))


def _between_means(mass: list[Tensor], means: list[Tensor]) -> Tensor:
    """What two clusters' squared errors lack to that of their union."""
    whole = mass[0] + mass[1]
    return torch.where(whole > 0, mass[0] * mass[1] / whole * (means[0] - means[1]).square(), 0.0)


def _prefix(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _between(prefix: Tensor, places: Tensor) -> Tensor:
    """Sums between neighbouring cuts, [units, cuts + 1]."""
    inner = prefix.gather(1, places)
    return torch.diff(inner, dim=1, prepend=prefix[:, :1], append=prefix[:, -1:])
