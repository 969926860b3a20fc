"""Statistics of inputs by channel, put together for what shares a scale: `units` groups of neighbouring channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lilliput.stats import bins
from lilliput.stats.site import SiteStats

STEPS = 60  # ranges that a search tries, up to 1.2 times the largest input
_PART = 50
_FINE = 8  # points in a bin of half an octave


def extremes(stats: SiteStats, units: int, how: Literal["minmax", "average"] = "minmax") -> tuple[Tensor, Tensor]:
    """Smallest and largest input of each unit, float32 [units]: of all tokens, or the means over samples of each
    sample's."""
    low, high = (stats.need("low"), stats.need("high")) if how == "minmax" else stats.peaks()
    return low.view(units, -1).amin(1), high.view(units, -1).amax(1)


def largest(stats: SiteStats, units: int) -> Tensor:
    """The largest |x| of each unit, float32 [units]."""
    return stats.need("absmax").view(units, -1).amax(1)


def counts(histogram: Tensor, units: int) -> Tensor:
    """Histograms [width, bins] as those of units, float64 [units, bins]."""
    return histogram.double().view(units, -1, histogram.shape[1]).sum(1)


def points(counted: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes that stand for what histograms [units, bins] have counted, and how many inputs each stands for: both
    float64 [units, n]. Within a bin inputs lie as in a geometric row; none is above `top` [units], the largest."""
    edges = bins.edges(counted.device)
    low, high = edges[:-1].clone(), edges[1:]
    low[0] = high[0] / 2
    share = (torch.arange(_FINE, dtype=torch.float64, device=counted.device) + 0.5) / _FINE
    inside = low[:, None] * (high / low)[:, None] ** share  # [bins, fine]
    sizes = torch.minimum(inside.flatten()[None], top.double()[:, None])
    return sizes, (counted / _FINE).repeat_interleave(_FINE, dim=1)


def searched(
    counted: Tensor, top: Tensor, rounded: Callable[[Tensor, Tensor], Tensor], steps: int = STEPS
) -> tuple[float, Tensor]:
    """Of grids that reach r * `top` [1], r = 1/50, 2/50, .. `steps`/50 (none: r = 1), the one of least expected squared
    error on a histogram [1, bins]: the error, and what the grid reaches, [1]; the largest such r where several agree.

    `rounded(x, c)` puts x float32 on the grid that reaches c; a `top` of 0 counts as 1.
    """
    top = torch.where(top > 0, top, 1.0).double()
    sizes, weights = points(counted, top)
    tried = torch.arange(steps, 0, -1, dtype=torch.float64, device=top.device) / _PART if steps else top.new_ones(1)
    reached = (tried[:, None] * top).float()  # [steps, 1]
    x = sizes.float().expand(len(reached), -1).clone()
    errors = (weights * (rounded(x, reached).double() - sizes).square()).sum(1)
    best = errors.argmin()
    return float(errors[best]), reached[best]
