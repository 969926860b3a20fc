"""LoRC: a low-rank part for what quantization lost.

E = W - What ~ (U_m S_m^1/2) (S_m^1/2 V_mT), the m largest singular values of the rest that earlier steps leave; y = x
WhatT + (x B_rT) A_lT. The left factor is rounded as it will be stored, and the right one then is the least-squares
answer to it, so that the factors' own rounding is made up for.

Paper: Yao et al. 2023, ZeroQuant-V2, arXiv 2303.08302.
Cost: the eigenvectors of a matrix of the smaller side, in float64. Limits: the error of a good quantizer is close to
noise, of which a low rank captures little; place it after a quantizer of 2 or 3 bits, or after pruning: the kept
weights (or their codes) become the first part, and the sum has no zeros left. It knows nothing of the inputs.
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
    """See the module's docstring."""

    factors: Factors = Field("float16", description="how both factors are stored")


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """One low-rank part. Raises PlanError without a rank, or for one that the matrix cannot have."""
    if target.rank is None:
        raise PlanError("'lorc' needs a rank: set target.rank, such as 8")
    factor = factor_spec(o.factors)
    return Scheme((LowRankSpec(lowrank.checked(target.rank, rows, width), factor, factor),))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The low-rank part of the remainder after the layer's parts.

    Raises PlanError as `scheme` does, LilliputError for a pruned layer, for a weight that is not finite and for factors
    that their type cannot hold.
    """
    rest = rest_of(layer)
    scheme(target, o, *rest.shape)
    return layer.with_part(approximate(rest, target.rank or 0, factor_spec(o.factors)))


METHOD = Compress(
    paper="Yao et al. 2023, arXiv 2303.08302",
    options=Options,
    needs=(),
    writes="parts",
    covers={
        "lorc": [
            {"method": "rtn", "target": {"bits": 4}},
            {"method": "lorc", "target": {"rank": 8}},
        ],
    },
    run=compress,
    scheme=scheme,
    masked=False,
    compensates=True,
    double=True,
)
