"""Signs and two value vectors: the decomposition that one-bit training starts from.

W ~ sign(W) * (a bT), a [out] and b [in] of least sum h_j (|W_ij| - a_i b_j)^2: for h = 1 the first singular pair of
|W|, whose entries are not negative. h_j = sum x_j^2 with `importance`, which is no part of the paper.

Paper: Xu et al. 2024, OneBit, arXiv 2402.11295.
Cost: some thirty products of |W| with a vector. Limits: about one bit a weight; unusable before training. No value is
0: pruned layers are refused.
"""

from __future__ import annotations

from pydantic import Field

from lilliput.errors import PlanError
from lilliput.formats.sign import from_target
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

NEEDS = ("square",)


class Options(Strict):
    """See the module's docstring."""

    importance: bool = Field(True, description="weight input j by its mean square")
    rounds: int = Field(30, ge=1, le=1000, description="rounds of alternating least squares")


def needs(o: Options) -> tuple[str, ...]:
    """Only importance takes calibration."""
    return NEEDS if o.importance else ()


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Signs and vectors for the remainder after the layer's parts.

    Raises PlanError for a pruned layer, LilliputError for values that are not finite.
    """
    form = from_target(target)
    if layer.support is not None:
        raise PlanError(f"{layer.name} is pruned, and signs have no code for 0: leave one of the two steps out")
    weight = layer.rest()
    importance = stats.second_moment() if o.importance and stats.count else None
    grid = form.fit(weight, importance=importance, rounds=o.rounds)
    return layer.with_part(QuantizedPart(form, form.encode(weight, grid), grid))


METHOD = Compress(
    paper="Xu et al. 2024, arXiv 2402.11295",
    options=Options,
    needs=NEEDS,
    reads=needs,
    writes="quantized",
    formats=("sign",),
    covers={
        "svid": [{"method": "svid", "target": {"format": "sign"}}],
    },
    run=compress,
    rowwise=False,  # the rows of a matrix share b
)
