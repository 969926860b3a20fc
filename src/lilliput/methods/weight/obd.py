"""OBD: optimal brain damage: removes the weights whose removal costs least by the diagonal of the Hessian.

Score 1/2 H_qq w_q^2, the second-order change of the loss when w_q alone becomes zero and nothing makes up for it.
`curvature` fisher takes H_qq as the mean over samples of the squared gradient of the model's loss, so that weights of
all outputs of a linear are comparable; gram as the mean square of the input, the Hessian of the linear's own outputs:
that is Wanda's order. The lowest are removed within the layer (or within each output row), or all but N of every M
consecutive inputs. No weight is updated.

Paper: LeCun et al. 1989, Optimal Brain Damage.
Cost: with fisher one backward pass through the model; one selection. Limits: couplings between weights are left out
(see `obs`); the Fisher information stands for the Hessian only where the model predicts its text well.
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
from lilliput.verbs.spec import FISHER


class Options(Strict):
    """`scope`: what competes for a place when the target names a sparsity and no pattern."""

    scope: Literal["layer", "row"] = Field("layer", description="weights that are compared with each other")
    curvature: Literal["fisher", "gram"] = Field(
        "fisher", description="the Hessian's diagonal: of the model's loss, or of the linear's outputs"
    )
    fisher_samples: int | None = Field(None, ge=1, description="calibration samples for the gradients; none: all")


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a support. Raises PlanError when the target asks for no sparsity."""
    weight = layer.rest()
    if o.curvature == "fisher":
        curve = layer.need_fisher()
    else:
        curve = stats.second_moment() if stats.count else torch.ones(stats.width, device=weight.device)
    # A common factor leaves the order, and keeps squares of small gradients in float32's range.
    score = 0.5 * weight.square() * (curve / curve.max().clamp(min=torch.finfo(curve.dtype).tiny))
    return layer.with_support(masks.choose(score, target.sparsity, target.pattern, o.scope))


METHOD = Compress(
    paper="LeCun et al. 1989 (NIPS)",
    options=Options,
    needs=("square", FISHER),
    reads=lambda o: (FISHER,) if o.curvature == "fisher" else ("square",),
    fisher_samples=lambda o: o.fisher_samples,
    writes="support",
    covers={"obd": [{"method": "obd", "target": {"sparsity": 0.5}}]},
    run=compress,
    rowwise=True,
    kept=scope.kept,
    mixes=scope.mixes,
)
