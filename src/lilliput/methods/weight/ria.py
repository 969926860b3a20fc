"""RIA: removes the weights that matter least to their output and to their input, times a root of the input's size.

Score (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * |X_j|^a with |X_j| the norm of input j over the calibration
tokens: a weight counts by its share of all weights on its input and of all weights of its output, so that no input and
no output loses everything. The lowest are removed within each output row (or within the layer), or all but N of every M
consecutive inputs. No weight is updated.

Paper: Zhang et al. 2024 (Plug-and-Play), relative importance and activations; a = 0.5.
Cost: two sums, one selection per row. Limits: sums over outputs are those of one linear, so linears that share their
inputs are not treated as one. The paper's permutation of inputs before N:M is `channel-permutation` in front of this
step, for the inputs that have no order of their own.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from lilliput.algebra import masks
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs import scope
from lilliput.verbs.compress import Compress


class Options(Strict):
    """`scope`: what competes for a place when the target names a sparsity and no pattern."""

    scope: Literal["row", "layer"] = Field("row", description="weights that are compared with each other")
    exponent: float = Field(0.5, ge=0.0, le=2.0, description="of the size of an input in the score; 0: no calibration")


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a support. Raises PlanError when the target asks for no sparsity."""
    size = layer.rest().abs()
    least = torch.finfo(size.dtype).tiny
    share = size / size.sum(0).clamp(min=least) + size / size.sum(1, keepdim=True).clamp(min=least)
    if o.exponent and stats.count:
        share = share * stats.second_moment().pow(o.exponent / 2)
    return layer.with_support(masks.choose(share, target.sparsity, target.pattern, o.scope))


METHOD = Compress(
    paper="Zhang et al. 2024 (ICLR), Plug-and-Play: An Efficient Post-training Pruning Method for LLMs",
    options=Options,
    needs=("square",),
    reads=lambda o: ("square",) if o.exponent else (),
    writes="support",
    baseline="magnitude",
    covers={"ria": [{"method": "channel-permutation"}, {"method": "ria", "target": {"pattern": "2:4"}}]},
    run=compress,
    kept=scope.kept,
)
