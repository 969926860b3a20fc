"""First-order Taylor pruning: removes the weights whose removal changes the loss least to first order.

To first order the loss changes by -w g when the weight w becomes zero, g being its gradient. Samples are looked at one
by one: the score is |w| * sqrt(mean over samples of g^2), the root mean square of the change that each sample's loss
would see. Changes of opposite sign do not cancel, as they would in |w * mean g|, which at a trained model is close to
zero for every weight. The lowest are removed within the layer (or within each output row), or all but N of every M
consecutive inputs. No weight is updated.

Paper: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, arXiv 1906.10771.
Cost: one backward pass through the model; one selection. Limits: the mean gradient is not kept, so the signed change
of the mean loss is not available; in one scope the order is that of `obd` with fisher, whose score is half this one's
square.
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
from lilliput.verbs.spec import FISHER


class Options(Strict):
    """`scope`: what competes for a place when the target names a sparsity and no pattern."""

    scope: Literal["layer", "row"] = Field("layer", description="weights that are compared with each other")
    fisher_samples: int | None = Field(None, ge=1, description="calibration samples for the gradients; none: all")


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a support. Raises PlanError when the target asks for no sparsity."""
    score = layer.rest().abs() * layer.need_fisher().sqrt()
    return layer.with_support(masks.choose(score, target.sparsity, target.pattern, o.scope))


METHOD = Compress(
    paper="Molchanov et al. 2019, arXiv 1906.10771",
    options=Options,
    needs=(FISHER,),
    fisher_samples=lambda o: o.fisher_samples,
    writes="support",
    covers={"taylor-first-order": [{"method": "taylor-first-order", "target": {"sparsity": 0.5}}]},
    run=compress,
    rowwise=True,
    kept=scope.kept,
    mixes=scope.mixes,
)
