"""Magnitude pruning: removes the smallest weights, data free.

Score |W_ij|; the lowest are removed within the whole layer, within each row, or all but N of every M consecutive
inputs.

The terms of pruning (`mask-formalism`), and where each is decided here. The model computes with M * W, M a mask of 0
and 1, the layer's support. A score says what a weight is worth: its size here, its size times that of its input in
`wanda`. A scope says which weights compete: `scope` and target.pattern. A share says how many are removed:
round(sparsity * n) of the n weights of a scope, exactly; of equal scores the earlier weight stays; 0 leaves the layer
as it is and 1 leaves nothing of it. The unit is a single weight: heads, neurons and blocks are not removed. All of it
is post-training, in one shot and local: each layer for itself, where `owl` in front divides one share between layers.
Both scores need no gradients; this one needs no data. The remaining weights are updated, if at all, by a later step
that respects the support, such as `gptq`; nothing here prunes during training, or in several rounds.

Paper: Han et al. 2015, arXiv 1506.02626; N:M: Mishra et al. 2021, arXiv 2104.08378.
Cost: one selection per scope. Limits: weak on language models, whose inputs differ a thousandfold in size.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lilliput.algebra import masks
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs import scope
from lilliput.verbs.compress import Compress


class Options(Strict):
    """`scope`: what competes for a place when the target names a sparsity and no pattern."""

    scope: Literal["layer", "row"] = Field("layer", description="weights that are compared with each other")


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a support. Raises PlanError when the target asks for no sparsity."""
    return layer.with_support(masks.choose(layer.rest().abs(), target.sparsity, target.pattern, o.scope))


METHOD = Compress(
    paper="Han et al. 2015, arXiv 1506.02626",
    options=Options,
    needs=(),
    writes="support",
    covers={
        "magnitude": [{"method": "magnitude", "target": {"sparsity": 0.5}}],
        "nm-sparsity": [{"method": "magnitude", "target": {"pattern": "2:4"}}],
        "mask-formalism": None,
    },
    run=compress,
    kept=scope.kept,
)
