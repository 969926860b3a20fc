"""GBLM-Pruner: Wanda's score, and the size of the gradients of the model's loss beside it.

Score |W_ij| * |X_j|_2 + alpha * |W_ij| * |G_ij|_2, with X the inputs of all calibration tokens and G the gradients of
the samples' losses, stacked. Both norms are divided by the root of the number of their terms, so that their ratio to
alpha does not depend on the amount of text. The lowest are removed within each output row (or within the layer), or all
but N of every M consecutive inputs. No weight is updated. `inputs` false leaves the gradients alone (`pgz`).

Paper: Das et al. 2023 (Beyond Size: How Gradients Shape Pruning Decisions), arXiv 2311.04902; alpha = 100, p = 2.
Cost: one backward pass through the model, the squared norm of each input, one selection per row. Limits: p = 1 would
need the absolute gradients of samples, of which only squares are kept; which rule `pgz` stands for is known in words
only (a first-order score), and the order of its scores is that of `taylor-first-order` within rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from lilliput.algebra import masks
from lilliput.errors import PlanError
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs import scope
from lilliput.verbs.compress import Compress
from lilliput.verbs.spec import FISHER


class Options(Strict):
    """`scope`: what competes for a place when the target names a sparsity and no pattern."""

    scope: Literal["row", "layer"] = Field("row", description="weights that are compared with each other")
    alpha: float = Field(
        100.0, ge=0.0, description="weight of the gradients' term; 0 is wanda, without a backward pass"
    )
    inputs: bool = Field(True, description="the inputs' term too; false: gradients alone, whatever alpha is above 0")
    fisher_samples: int | None = Field(None, ge=1, description="calibration samples for the gradients; none: all")


def reads(o: Options) -> tuple[str, ...]:
    """What the terms of the score take."""
    return (*(("square",) if o.inputs else ()), *((FISHER,) if o.alpha else ()))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a support. Raises PlanError when the target asks for no sparsity, and for a score of no term."""
    if not (o.alpha or o.inputs):
        raise PlanError("'gblm-pruner' scores by neither inputs nor gradients: set 'inputs', or 'alpha' above 0")
    weight = layer.rest().abs()
    size = stats.norms(weight.device) if o.inputs else torch.zeros(stats.width, device=weight.device)
    score = weight * (size + o.alpha * layer.need_fisher().sqrt() if o.alpha else size)
    return layer.with_support(masks.choose(score, target.sparsity, target.pattern, o.scope))


METHOD = Compress(
    paper="Das et al. 2023, arXiv 2311.04902",
    options=Options,
    needs=("square", FISHER),
    reads=reads,
    fisher_samples=lambda o: o.fisher_samples,
    writes="support",
    covers={
        "gblm-pruner": [{"method": "gblm-pruner", "target": {"sparsity": 0.5}}],
        "pgz": [{"method": "gblm-pruner", "target": {"sparsity": 0.5}, "options": {"inputs": False}}],
    },
    run=compress,
    rowwise=True,
    kept=scope.kept,
    mixes=scope.mixes,
)
