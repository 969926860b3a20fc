"""Flips: positions where exactly one of both models has the true next token as its first choice.

A compressed model can keep its accuracy and yet answer otherwise; "Accuracy is Not All You Need" (arXiv 2407.09141)
counts the answers that change from right to wrong or back.
"""

from __future__ import annotations

from torch import Tensor

from lilliput.metrics.interval import Interval, clip, mean_interval
from lilliput.metrics.metric import Metric


def flips(right: Tensor, reference_right: Tensor) -> Interval:
    """Share of positions, from two booleans at each position [windows, scored tokens]. Stays within 0 and 1."""
    return clip(mean_interval((right != reference_right).double().mean(dim=1)), 0.0, 1.0)


METRIC = Metric(
    how="lilliput eval DIR --against MODEL",
    key="quality.data[].flips",
    unit="share of positions",
    interval="Student's t over windows",
    paper="Dutta et al. 2024, arXiv:2407.09141",
)
