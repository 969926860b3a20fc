"""Perplexity: exp of the mean negative log-likelihood per token.

Each window is scored by itself, without its first token, for which there is nothing to predict it from. Comparable only
at equal text, tokenizer and window length.
"""

from __future__ import annotations

import math

from torch import Tensor

from lilliput.metrics.interval import Interval, clip, exp_interval
from lilliput.metrics.metric import Metric


def perplexity(nll: Tensor) -> Interval:
    """From nll [windows, scored tokens] in nats; windows are of equal length, so the mean of means is the mean.

    The interval stops at 1, the perplexity of a model that knows the text.
    """
    return clip(exp_interval(nll.double().mean(dim=1)), 1.0, math.inf)


METRIC = Metric(
    how="lilliput eval DIR --data wikitext2 --data c4 --windows 32 --tokens 2048",
    key="quality.data[].perplexity",
    unit="1, vocabulary size for a uniform model",
    interval="Student's t over windows, on the log scale",
    covers=("perplexity",),
)
