"""Quantiles of the divergence over all positions: what the worst tokens suffer, which a mean hides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lilliput.errors import DataError
from lilliput.metrics.interval import Interval, clip, t_quantile
from lilliput.metrics.metric import Metric

_DRAWS = 400


def kl_quantile(divergence: Tensor, share: float, seed: int = 0) -> Interval:
    """The `share` quantile of the divergence at all positions [windows, scored tokens], nats per token.

    Interval: Student's t times the standard deviation over bootstrap draws of whole windows (a fixed seed), stretched
    by sqrt(n / (n - 1)) as the bootstrap is too narrow for few windows. The draws are ours: scipy's bootstrap sorts all
    positions again for each. Raises DataError for fewer than two windows.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"no quantile at {share}")
    count = divergence.shape[0]
    if count < 2:
        raise DataError(f"{count} window gives no interval: evaluate at least 2 windows.")
    values, order = divergence.double().reshape(-1).sort()
    rank = max(1, math.ceil(share * len(values)))
    value = float(values[rank - 1])
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(count, (_DRAWS, count), generator=generator)
    times = torch.zeros(_DRAWS, count, dtype=torch.int64).scatter_add_(1, draws, torch.ones_like(draws))
    # A draw repeats whole windows, so its quantile is one of the values as they are sorted once: the first place up to
    # which the windows, each as often as it was drawn, hold enough values. Found by bisection for all draws at once.
    places = order.argsort().view(count, -1).sort(1).values
    low, high = torch.zeros(_DRAWS, dtype=torch.int64), torch.full((_DRAWS,), len(values) - 1)
    while bool((low < high).any()):
        middle = (low + high) // 2
        counted = torch.searchsorted(places, middle.expand(count, -1).contiguous(), right=True)
        enough = (counted.T * times).sum(1) >= rank
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    quantiles = values[low]
    half = t_quantile(count - 1) * float(quantiles.std(correction=1)) * math.sqrt(count / (count - 1))
    return clip(Interval(value, value - half, value + half), 0.0, math.inf)


METRIC = Metric(
    how="lilliput eval DIR --against MODEL",
    key="quality.data[].kl_p95, quality.data[].kl_p99",
    unit="nats per token",
    interval="bootstrap over windows",
)
