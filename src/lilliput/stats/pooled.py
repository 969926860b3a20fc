"""Statistics of inputs by channel, put together for what shares a scale: `units` groups of neighbouring channels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lilliput.stats import bins
from lilliput.stats.site import SiteStats

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
