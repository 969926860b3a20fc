"""EoRA: a low-rank product makes up for what earlier steps lost, in the eigenspace of the inputs.

E = W - (the parts so far), G = Q L QT the Gram matrix of the inputs. EoRA takes the rank-r SVD of E Q L^(1/2) = U S VT
and multiplies by (Q L^(1/2))^-1. That is U_r U_rT E, U the eigenvectors of E G ET: among all matrices of rank r the one
that leaves the least output error tr((E - P) G (E - P)T), so it never is above LoRC, the plain SVD of E. No inverse is
taken, and directions that no token reached are ordered by E itself. The left factor is rounded to its stored type
before the right one is fitted.

Paper: Liu et al. 2024, arXiv 2410.21271.
Cost: out * in^2 for the covariance, an eigendecomposition of the smaller side in float64. Stored: r (out + in) numbers.
Limits: G describes the calibration text; the product is dense. After pruning the kept weights (or their codes) become
the first part and E is what pruning lost, so that the sum is nearer to W and has no zeros left.
"""

from __future__ import annotations

from pydantic import Field

from lilliput.algebra import lowrank
from lilliput.errors import PlanError
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import Factors, LowRankSpec, approximate, factor_spec, rest_of
from lilliput.parts.scheme import Scheme
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress


class Options(Strict):
    """`factors`: integers have one half-precision scale for each row of a factor; int8 costs no error that shows."""

    factors: Factors = Field("int8", description="how the factors are stored")


def rank_of(target: Target, rows: int, width: int) -> int:
    """The target's rank. Raises PlanError where it names none, or one that the [rows, width] matrix cannot have."""
    if target.rank is None:
        raise PlanError("a low-rank correction needs target.rank, such as 16 or 32")
    return lowrank.checked(target.rank, rows, width)


def scheme(target: Target, options: Options, rows: int, width: int) -> Scheme:
    """A product of two factors. Raises PlanError; see `rank_of`."""
    factor = factor_spec(options.factors)
    return Scheme((LowRankSpec(rank_of(target, rows, width), factor, factor),))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with one part more. Raises LilliputError for values that are not finite, and for a pruned layer."""
    rest = rest_of(layer)
    rank = rank_of(target, *rest.shape)
    metric = stats.need("gram") if stats.count else None
    return layer.with_part(approximate(rest, rank, factor_spec(o.factors), metric))


METHOD = Compress(
    paper="Liu et al. 2024, arXiv 2410.21271",
    options=Options,
    needs=("gram",),
    writes="parts",
    default={"rank": 32},
    baseline="lorc",
    covers={
        "eora": [{"method": "gptq", "target": {"bits": 3}}, {"method": "eora", "target": {"rank": 32}}],
    },
    run=compress,
    scheme=scheme,
    masked=False,
    compensates=True,
    double=True,
)
