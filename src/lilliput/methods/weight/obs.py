"""OBS, optimal brain surgeon in one shot: the exact cost of each single removal, then a joint update of all that stays.

With the quadratic loss 1/2 tr(D H DT) of a linear's outputs, H = XT X with damping and shrinkage as in gptq, removing
the weight w_q of a row alone costs w_q^2 / (2 [H^-1]_qq), after the others of the row have moved by
-w_q / [H^-1]_qq * H^-1[:, q]. The weights of least cost leave together, within each row (or within the layer), or all
but N of every M consecutive inputs. Then the weights that stay take the values of least loss on this mask, which is the
joint update -H^-1[:, Q] ([H^-1]_QQ)^-1 w_Q for the set Q of a row's removed weights. It is solved for all rows at once
by conjugate gradients, so that no inverse of a row's own is formed. Where one weight of a row leaves, this is the
surgeon itself; where many leave, costs are those before any has left. The surgeon's own order, one weight after the
other with a new inverse each time, takes out * in^3 operations (see `obq`); `sparsegpt` goes input by input instead.

Paper: Hassibi and Stork 1993, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon.
Cost: in^3 for the inverse's diagonal, out * in^2 for each step of the update. Memory: one matrix [in, in] beside the
Gram matrix. Limits: the Hessian is that of the linear's outputs, not of the model's loss; costs of single removals
understate what the removal of several related weights takes, more so the higher the sparsity.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lilliput.algebra import masked, masks, obs
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs import scope
from lilliput.verbs.compress import Compress


class Options(Strict):
    """`scope`: what competes for a place when the target names a sparsity and no pattern."""

    scope: Literal["row", "layer"] = Field("row", description="weights that are compared with each other")
    damping: float = Field(0.01, ge=0.0, le=10.0, description="added to the Gram diagonal, as a share of its mean")
    shrinkage: float = Field(
        0.2, ge=0.0, le=10.0, description="added to each Gram diagonal entry, as a share of itself"
    )
    steps: int = Field(30, ge=0, le=1000, description="steps of conjugate gradients for the update; 0: no update")


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a support and updated values. Raises PlanError when the target asks for no sparsity,
    LilliputError for a weight or Gram matrix that is not finite."""
    weight, gram = layer.rest(), stats.need("gram")
    inverse = obs.inverse_diagonal(obs.factorize(gram, o.damping, None, o.shrinkage))
    mask = masks.choose(weight.square() / (2.0 * inverse), target.sparsity, target.pattern, o.scope)
    pruned = layer.with_support(mask)
    if o.steps == 0 or pruned.support is None:
        return pruned
    matrix = obs.regularized(gram, o.damping, o.shrinkage)
    return layer.with_support(mask, masked.refit(weight, pruned.support, matrix, o.steps))


METHOD = Compress(
    paper="Hassibi and Stork 1993 (NIPS)",
    options=Options,
    needs=("gram",),
    writes="support",
    baseline="magnitude",
    covers={"obs": [{"method": "obs", "target": {"sparsity": 0.5}}]},
    run=compress,
    rowwise=True,
    kept=scope.kept,
    mixes=scope.mixes,
)
