"""Magnitude pruning: the smallest weights leave, data free.

Score |W_ij|; the lowest leave within the whole layer, within each row, or all but N of every M consecutive inputs.

Paper: Han et al. 2015, arXiv 1506.02626; N:M: Mishra et al. 2021, arXiv 2104.08378.
Cost: one selection per scope. Limits: weak on language models, whose inputs differ a thousandfold in size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from lilliput.algebra import masks
from lilliput.parts.layer import Layer
from lilliput.recipe import Strict, Target
from lilliput.stats.site import SiteStats

PAPER = "Han et al. 2015, arXiv 1506.02626"
NEEDS: tuple[str, ...] = ()
WRITES: Literal["support"] = "support"
ROWWISE = False
BASELINE: str | None = None
COVERS: Mapping[str, list[dict[str, Any]] | None] = {
    "magnitude": [{"method": "magnitude", "target": {"sparsity": 0.5}}],
    "nm-sparsity": [{"method": "magnitude", "target": {"pattern": "2:4"}}],
    "mask-formalism": None,
}


class Options(Strict):
    """`scope`: what competes for a place when the target names a sparsity and no pattern."""

    scope: Literal["layer", "row"] = Field("layer", description="weights that are compared with each other")


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a support. Raises PlanError when the target asks for no sparsity."""
    return layer.with_support(masks.choose(layer.rest().abs(), target, o.scope))
