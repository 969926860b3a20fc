"""Kullback-Leibler divergence KL(reference || model) of the next-token distributions, in nats per token.

Unlike perplexity it cannot improve by luck: it is 0 only where the distributions are equal.
"""

from __future__ import annotations

import math

from torch import Tensor

from lilliput.metrics.interval import Interval, clip, mean_interval
from lilliput.metrics.metric import Metric


def kl(divergence: Tensor) -> Interval:
    """From the divergence at each position [windows, scored tokens], nats. The interval stops at 0."""
    return clip(mean_interval(divergence.double().mean(dim=1)), 0.0, math.inf)


METRIC = Metric(
    how="lilliput eval DIR --against MODEL",
    key="quality.data[].kl",
    unit="nats per token",
    interval="Student's t over windows",
)
