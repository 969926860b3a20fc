"""95 % intervals over windows, right for few of them.

Windows are the units: tokens of one window depend on each other, windows nearly do not. The mean over n windows is
bracketed by Student's t with n - 1 degrees of freedom (Student 1908), which for 8 windows is 21 % wider than the
normal approximation and holds its 95 % where a percentile bootstrap falls short.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from lilliput.errors import DataError

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def t_quantile(dof: int, level: float = LEVEL) -> float:
    """t with P(|T| <= t) = level for `dof` >= 1 degrees of freedom.

    By `scipy.special`, which `scipy.stats.t` calls as well: it is imported in no time, and memory is counted here.
    """
    if dof < 1 or not 0 < level < 1:
        raise ValueError(f"no quantile for {dof} degrees of freedom at level {level}")
    return float(stdtrit(dof, (1 + level) / 2))


def mean_interval(values: Tensor) -> Interval:
    """Mean of values [windows] (any float dtype) with its interval. Raises DataError for fewer than two windows."""
    count = values.numel()
    if count < 2:
        raise DataError(f"{count} window gives no interval: evaluate at least 2 windows.")
    values = values.to(torch.float64)
    mean = float(values.mean())
    half = t_quantile(count - 1) * float(values.std(correction=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def exp_interval(logs: Tensor) -> Interval:
    """exp of the mean of logs [windows], the interval taken on the log scale: never negative, right for ratios."""
    inner = mean_interval(logs)
    return Interval(_exp(inner.value), _exp(inner.low), _exp(inner.high))


def _exp(x: float) -> float:
    # Past that a float64 overflows, or becomes 0 and has no logarithm; e^700 says "useless" just as well.
    return math.exp(min(max(x, -700.0), 700.0))


def clip(interval: Interval, low: float, high: float) -> Interval:
    """The interval cut to what the quantity can be."""
    return Interval(interval.value, max(interval.low, low), min(interval.high, high))
