"""Binary-coding quantization: each group of weights as sums of b signed alphas and an offset.

w ~ z + sum_i alpha_i b_i, b_i in {-1, +1}. The start is greedy (z the mean, b_i = sign(r), alpha_i = mean |r|,
r -= alpha_i b_i) or the integer grid of least error, which is the case alpha_i = S 2^(i-1); then alternation:
alphas and offset by weighted least squares for the codes, codes to the nearest of the 2^b sums. No group's error rises.
The weight of input j is H_jj = sum x_j^2.

Beyond the paper: with `sweep` the codes are then chosen anew by the GPTQ sweep, each input to its nearest sum, errors
pushed onto the inputs that are still free; alphas stay.

LUT-GEMM computes with the codes: sum_i alpha_i (B_i x), where B_i x is a sum over tables of the 2^8 signed sums of
eight inputs. The runtime does so for a few tokens at a time on a CPU, as in decoding, where groups are of whole bytes:
look-ups then take a twentieth to three quarters of the time of decoding the weight (one token least).

Paper: Xu et al. 2018, arXiv 1802.00150; LUT-GEMM: Park et al. 2022, arXiv 2206.09557.
Cost: per round of alternation out * in * (b + 1)^2 multiply-adds and a sort of 2^b levels a group; the sweep as in
gptq. Limits: a group stores (b + 1) numbers of 16 bits, two to three times what an integer grid stores: choose larger
groups. No sum is exactly 0: pruned layers are refused.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lilliput.algebra import obs, values
from lilliput.errors import PlanError
from lilliput.formats import groups
from lilliput.formats.binary import from_target
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

NEEDS = ("gram",)


class Options(Strict):
    """See the module's docstring."""

    start: Literal["greedy", "uniform", "best"] = Field(
        "best", description="first alphas: the paper's, those of an integer grid, or the better for each group"
    )
    rounds: int = Field(15, ge=0, le=200, description="rounds of alternation at most")
    importance: bool = Field(True, description="weight input j by its sum of squares")
    sweep: bool = Field(True, description="choose the codes by the GPTQ sweep; alphas stay")
    act_order: bool = Field(True, description="sweep the inputs by decreasing mean square")
    damping: float = Field(0.01, ge=0.0, le=10.0, description="added to the Gram diagonal, as a share of its mean")
    shrinkage: float = Field(
        0.2, ge=0.0, le=10.0, description="added to each Gram diagonal entry, as a share of itself; 0 is the paper's"
    )


def needs(o: Options) -> tuple[str, ...]:
    """Without importance and sweep nothing is calibrated."""
    return NEEDS if o.importance or o.sweep else ()


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes for the remainder after the layer's parts.

    Raises PlanError without bits in the target or for a pruned layer, LilliputError for values that are not finite.
    """
    form = from_target(target)
    if layer.support is not None:
        raise PlanError(f"{layer.name} is pruned, and binary coding has no code for 0: leave one of the two steps out")
    weight = layer.rest()
    gram = stats.need("gram") if needs(o) else None
    importance = None
    if gram is not None and o.importance:
        importance = gram.diagonal() + o.damping * gram.diagonal().mean()
    grid = form.fit(weight, importance=importance, start=o.start, rounds=o.rounds)
    if gram is None or not o.sweep:
        return layer.with_part(QuantizedPart(form, form.encode(weight, grid), grid))
    order = gram.diagonal().argsort(descending=True, stable=True) if o.act_order else None
    factor = obs.factorize(gram, o.damping, order, o.shrinkage)
    index = groups.index(weight.shape[1], form.group_size)
    visits = (index if order is None else index[order.cpu()]).tolist()

    def rounding(a: int, b: int) -> obs.Nearest:
        return values.Levels.of(grid.rows(a, b).levels().sort(-1).values, visits)

    rounded = values.sweep(weight, factor, order, rounding)
    return layer.with_part(QuantizedPart(form, form.encode(rounded, grid), grid))


METHOD = Compress(
    paper="Xu et al. 2018, arXiv 1802.00150",
    options=Options,
    needs=NEEDS,
    reads=needs,
    writes="quantized",
    formats=("binary",),
    baseline="rtn",
    covers={
        "bcq": [{"method": "bcq", "target": {"format": "binary", "bits": 4}}],
        "lut-gemm": [{"method": "bcq", "target": {"format": "binary", "bits": 3, "group_size": 32}}],
    },
    run=compress,
    rowwise=True,
    scratch=16 << 20,  # bytes beside what the plan counts for a sweep (measured)
)
