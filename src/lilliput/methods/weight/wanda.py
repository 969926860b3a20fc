"""Wanda: removes the weights whose product with the size of their input is smallest.

Score |W_ij| * |X_j|_2 over all calibration tokens; the lowest are removed within each output row (or within the layer),
or all but N of every M consecutive inputs. No weight is updated.

Paper: Sun et al. 2024, arXiv 2306.11695.
Cost: one selection per row and the squared norm of each input. Limits: an input that calibration never saw counts as
useless; without any tokens the score is the magnitude alone.
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

    scope: Literal["row", "layer"] = Field("row", description="weights that are compared with each other")


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a support. Raises PlanError when the target asks for no sparsity."""
    size = stats.norms(layer.weight.device)
    return layer.with_support(masks.choose(layer.rest().abs() * size, target.sparsity, target.pattern, o.scope))


METHOD = Compress(
    paper="Sun et al. 2024, arXiv 2306.11695",
    options=Options,
    needs=("square",),
    writes="support",
    baseline="magnitude",
    covers={
        "wanda": [{"method": "wanda", "target": {"sparsity": 0.5}}],
    },
    run=compress,
    kept=scope.kept,
    rowwise=True,
    mixes=scope.mixes,
)
