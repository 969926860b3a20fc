"""Quantiles of the divergence over all positions: what the worst tokens suffer, which a mean hides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lilliput.errors import DataError
from lilliput.metrics.interval import Interval, clip, t_quantile

_DRAWS = 400
_ROOM = 1 << 20  # values of several draws held at a time


def kl_quantile(divergence: Tensor, share: float, seed: int = 0) -> Interval:
    """The `share` quantile of the divergence at all positions [windows, scored tokens], nats per token.

    Interval: Student's t times the standard deviation over bootstrap draws of whole windows (a fixed seed), stretched
    by sqrt(n / (n - 1)) as the bootstrap is too narrow for few windows. Raises DataError for fewer than two windows.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"no quantile at {share}")
    count = divergence.shape[0]
    if count < 2:
        raise DataError(f"{count} window gives no interval: evaluate at least 2 windows.")
    values, order = divergence.double().reshape(-1).sort()
    window = order // divergence.shape[1]
    rank = max(1, math.ceil(share * len(values)))
    value = float(values[rank - 1])
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(count, (_DRAWS, count), generator=generator)
    times = torch.zeros(_DRAWS, count, dtype=torch.float64).scatter_add_(1, draws, torch.ones(_DRAWS, count).double())
    # A draw repeats whole windows: its quantile is found among the values as they are sorted once.
    upto = torch.nn.functional.one_hot(window, count).T.double().cumsum(1)
    at_once = max(1, _ROOM // len(values))
    places = [(times[a : a + at_once] @ upto < rank).sum(1) for a in range(0, _DRAWS, at_once)]
    found = values[torch.cat(places)]
    half = t_quantile(count - 1) * float(found.std(correction=1)) * math.sqrt(count / (count - 1))
    return clip(Interval(value, value - half, value + half), 0.0, math.inf)
