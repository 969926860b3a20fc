"""ISC: SparseGPT's sweep, with the saliencies of optimal brain surgeon and of optimal brain damage added up.

Score W_ij^2 / [H^-1]_jj + W_ij^2 * H_jj: what removing a weight costs if all others of its row make up for it, and what
it costs if none does. H = XT X with damping and shrinkage as in gptq. Both diagonals are those of the whole H, where
`sparsegpt` takes the inverse of the part that is still free. Zeros are chosen block by block on updated values, or N of
M inputs at a time, and the sweep's update is SparseGPT's. Sparsities of linears are divided by `samsp`.

Paper: Shao et al. 2024 (One-Shot Sensitivity-Aware Mixed Sparsity Pruning), arXiv 2310.09499.
Cost: that of `sparsegpt`, and in^3 / 3 for the diagonal of the inverse. Limits: those of `sparsegpt`.
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
        0.2, ge=0.0, le=10.0, description="added to each Gram diagonal entry, as a share of itself"
    )


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a support and updated values. Raises PlanError when the target asks for no sparsity,
    LilliputError for a weight or Gram matrix that is not finite."""
    factor = obs.factorize(stats.need("gram"), o.damping, None, o.shrinkage)
    worth = obs.inverse_diagonal(factor).reciprocal_() + obs.diagonal(factor)

    def score(values: Tensor, a: int, b: int) -> Tensor:
        return values.square() * worth[a:b, None]

    kept, updated = pruning.sweep(layer.rest(), factor, score, target, o.scope, o.block, layer.support)
    return layer.with_support(kept, updated)


METHOD = Compress(
    paper="Shao et al. 2024, arXiv 2310.09499",
    options=Options,
    needs=("gram",),
    writes="support",
    baseline="magnitude",
    covers={"isc-samsp": [{"method": "samsp"}, {"method": "isc", "target": {"sparsity": 0.5}}]},
    run=compress,
    rowwise=True,
    kept=scope.kept,
    mixes=scope.mixes,
)
