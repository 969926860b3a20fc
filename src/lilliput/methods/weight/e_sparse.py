"""E-Sparse: Wanda's score with the entropy of each input beside its size.

Score |W_ij| * (|X_j| + alpha * Ent_j), Ent_j = -sum p ln p the entropy of channel j's normalised histogram of |x| over
the calibration tokens, in bins of half a power of two: an input that takes many values tells more than one that is
nearly always the same. |X_j| is the channel's norm as a multiple of the mean norm of all channels, so that alpha
depends on neither the scale of the inputs nor the amount of text. The lowest are removed within each output row (or
within the layer), or all but N of every M consecutive inputs. No weight is updated.

Paper: Li et al. 2023, arXiv 2310.15929. Its bins and its alpha are not known here: 0.1 is a choice.
Cost: squared norms and a histogram of each input, one selection per row. Limits: the paper's shuffles of channels
before N:M are `channel-permutation` in front of this step (with assignments in place of swaps within windows), for
inputs that have no order of their own; bins are of |x|, without its sign.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from lilliput.algebra import masks
from lilliput.parts.layer import Layer
from lilliput.stats import bins
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs import scope
from lilliput.verbs.compress import Compress


class Options(Strict):
    """`scope`: what competes for a place when the target names a sparsity and no pattern."""

    scope: Literal["row", "layer"] = Field("row", description="weights that are compared with each other")
    alpha: float = Field(0.1, ge=0.0, description="weight of an input's entropy in nats; 0 is wanda")


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a support. Raises PlanError when the target asks for no sparsity."""
    weight = layer.rest().abs()
    size = stats.norms(weight.device)
    if o.alpha and stats.count:
        mean = size.mean().clamp(min=torch.finfo(size.dtype).tiny)
        size = size / mean + o.alpha * bins.entropy(stats.need("histogram"))
    return layer.with_support(masks.choose(weight * size, target.sparsity, target.pattern, o.scope))


METHOD = Compress(
    paper="Li et al. 2023, arXiv 2310.15929",
    options=Options,
    needs=("square", "histogram"),
    reads=lambda o: ("square", "histogram") if o.alpha else ("square",),
    writes="support",
    baseline="magnitude",
    covers={"e-sparse": [{"method": "e-sparse", "target": {"sparsity": 0.5}}]},
    run=compress,
    rowwise=True,
    kept=scope.kept,
    mixes=scope.mixes,
)
