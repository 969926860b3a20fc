"""From the sum of losses that single changes cost to the loss of all of them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_APART = 1.01  # least ratio of the sums of two points: closer ones tell no slope
_STEEPEST = 4.0  # slope beyond the last point at most: what is steeper between the last two is noise


@dataclass(frozen=True)
class Curve:
    """A rising line through measured points (sum, loss of all together), straight between their logarithms.

    Below the first point losses are proportional, as small ones are; above the last they go on as between the last two,
    but no steeper than the fourth power. Without points a sum is its own loss.
    """

    points: tuple[tuple[float, float], ...] = ()

    def at(self, total: float) -> float:
        """The loss of all together where single ones add up to `total`."""
        if not self.points or total <= 0:
            return max(total, 0.0)
        (low, first), *_ = self.points
        if total <= low or len(self.points) == 1:
            return first * total / low
        n = next((n for n, (x, _) in enumerate(self.points) if total <= x), len(self.points) - 1)
        (a, u), (b, v) = self.points[n - 1], self.points[n]
        slope = (math.log(v) - math.log(u)) / (math.log(b) - math.log(a))
        if total > b:
            return float(v * (total / b) ** min(slope, _STEEPEST))
        return float(u * (total / a) ** slope)


def through(measured: Sequence[tuple[float, float]]) -> Curve:
    """The curve through measured points; left out are those that are not positive, that do not rise, or that
    nearly coincide with the one before."""
    points: list[tuple[float, float]] = []
    for total, loss in sorted(measured):
        if total > 0 and loss > 0 and (not points or (total >= _APART * points[-1][0] and loss > points[-1][1])):
            points.append((total, loss))
    return Curve(tuple(points))
