"""Share of positions where model and reference find the same next token most likely."""

from __future__ import annotations

from torch import Tensor

from lilliput.metrics.interval import Interval, clip, mean_interval
from lilliput.metrics.metric import Metric


def agreement(same: Tensor) -> Interval:
    """From a boolean at each position [windows, scored tokens]. The interval stays within 0 and 1."""
    return clip(mean_interval(same.double().mean(dim=1)), 0.0, 1.0)


METRIC = Metric(
    how="lilliput eval DIR --against MODEL",
    key="quality.data[].agreement",
    unit="share of positions",
    interval="Student's t over windows",
)
