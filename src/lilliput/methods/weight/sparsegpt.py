"""SparseGPT: prune input after input, each error pushed onto the inputs that are still free.

Minimises tr(D H DT), D = W - What, H = XT X + damping * mean(diag) * I as in gptq, H^-1 = UT U with U upper triangular.
Of every block of inputs the weights of least w_j^2 / U_jj^2 become zero, w being what the sweep has made of them when
it reaches the block: of all rows together, or of each row. Then, input after input: q = 0 where pruned and w_j
elsewhere, e = (w_j - q) / U_jj, w_k -= e U_jk for all k > j, so that D = E U. N:M keeps N of M inputs of a row, chosen
when the sweep reaches these M. `algebra.obs` states the equal form that is computed: with H = R RT, 1 / U_jj = R_jj,
and nothing is inverted.

The score has the diagonal of U, that of the inverse of the Hessian of the inputs from j on, and not of H^-1: inputs
before j cannot change any more (`isc` and `obs` take the latter). A step that quantizes afterwards solves anew for the
original weight on these zeros, which loses less than rounding the updated values would; `admm-update` takes the values
to their optimum. `shrinkage` is gptq's.

Paper: Frantar and Alistarh 2023, arXiv 2301.00774; block 128, damping 0.01.
Cost: out * in^2 multiply-adds for the sweep, in^3 / 3 for the factor, one selection for each block. Memory: two copies
of the weight, one matrix [in, in] beside the Gram matrix. Limits: H describes the calibration text; errors only go to
later inputs, so an input early in the order is replaced better than a late one.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from lilliput.algebra import obs, pruning
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs import scope
from lilliput.verbs.compress import Compress


class Options(Strict):
    """`scope`: what competes for a place when the target names a sparsity and no pattern."""

    scope: pruning.Scope = Field("block", description="what is compared: a block's weights of all rows, or of each row")
    block: int = Field(obs.BLOCK, ge=1, description="inputs whose zeros are chosen together")
    damping: float = Field(0.01, ge=0.0, le=10.0, description="added to the Gram diagonal, as a share of its mean")
    shrinkage: float = Field(
        0.2, ge=0.0, le=10.0, description="added to each Gram diagonal entry, as a share of itself; 0 is the paper's"
    )


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a support and updated values. Raises PlanError when the target asks for no sparsity,
    LilliputError for a weight or Gram matrix that is not finite."""
    factor = obs.factorize(stats.need("gram"), o.damping, None, o.shrinkage)

    def score(values: Tensor, a: int, b: int) -> Tensor:
        return (values * factor.pivot[a:b, None]).square_()

    kept, updated = pruning.sweep(layer.rest(), factor, score, target, o.scope, o.block, layer.support)
    return layer.with_support(kept, updated)


METHOD = Compress(
    paper="Frantar and Alistarh 2023, arXiv 2301.00774",
    options=Options,
    needs=("gram",),
    writes="support",
    baseline="magnitude",
    covers={"sparsegpt": [{"method": "sparsegpt", "target": {"sparsity": 0.5}}]},
    run=compress,
    rowwise=True,
    kept=scope.kept,
    mixes=scope.mixes,
)
