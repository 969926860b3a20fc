"""OBQ: quantize one weight of a row after the other, each time the one that costs least, and let all others adapt.

For each row, with H = G + damping * mean(diag G) * I: the weight q of least (w_q - Q(w_q))^2 / [H^-1]_qq is rounded,
w -= (w_q - Q(w_q)) / [H^-1]_qq * H^-1[:, q], and q leaves H^-1 by one step of Gauss elimination,
H^-1 -= H^-1[:, q] H^-1[q, :] / [H^-1]_qq. Weights that have been pushed outside their grid go first (`outside_first`),
before their error grows. Scales are fitted before, on the original weight. In the fixed order 0 .. in - 1 it is GPTQ
without act_order, which was made from it.

Paper: Frantar and Alistarh 2022, arXiv 2208.11580. Cost: out * in^3 multiply-adds in float64, where GPTQ takes out *
in^2: hours for one linear of a large model; a reference, or for small layers. Memory: 2^25 numbers of inverses at a
time. Limits: the plan refuses a linear above `most` multiply-adds.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats.integer import IntegerFormat, from_target
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import Scheme, quantized
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

_ROOM = 1 << 25  # numbers of the inverses that are alive at a time


class Options(Strict):
    """See the module's docstring."""

    order: Literal["greedy", "fixed"] = Field(
        "greedy", description="the weight of least loss next, or from left to right"
    )
    outside_first: bool = Field(True, description="greedy only: weights outside their range before all others")
    damping: float = Field(0.01, gt=0.0, le=10.0, description="added to the Gram diagonal, as a share of its mean")
    search: Literal["minmax", "mse"] = Field(
        "mse", description="range of a group: min-max, or the range of least error"
    )
    most: float = Field(1e12, gt=0.0, description="multiply-adds (out * in^3) above which a linear is refused")


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """One integer part. Raises PlanError for a linear that would take more than `most` multiply-adds."""
    cost = float(rows) * float(width) ** 3
    if cost > o.most:
        raise PlanError(
            f"'obq' would take {cost:.1e} multiply-adds for {rows} outputs of {width} inputs, more than {o.most:.1e}: "
            "use gptq, exclude the layer, or raise the option 'most'"
        )
    return quantized(from_target(target))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes for the remainder after the layer's parts; outside the support they decode to 0.

    Raises PlanError without bits in the target, LilliputError for a weight or Gram matrix that is not finite.
    """
    form = from_target(target)
    weight = layer.rest()
    supported = weight if layer.support is None else torch.where(layer.support, weight, 0.0)
    gram = stats.need("gram")
    inverse = _inverse(gram.double(), o.damping)
    diagonal = gram.diagonal()
    grid = form.fit(supported, search=o.search, importance=diagonal + o.damping * diagonal.mean())
    rows, width = weight.shape
    scale, zero = (x.double().expand(rows, width) for x in form.expand(grid, width))
    codes = torch.empty(rows, width, dtype=torch.int8, device=weight.device)
    step = max(1, _ROOM // max(width * width, 1))
    for a in range(0, rows, step):
        b = min(a + step, rows)
        mask = None if layer.support is None else layer.support[a:b]
        codes[a:b] = _rows(weight[a:b].double(), inverse, scale[a:b], zero[a:b], mask, form, o)
    return layer.with_part(QuantizedPart(form, codes, grid))


def _inverse(gram: Tensor, damping: float) -> Tensor:
    """H^-1, float64. A Gram matrix of zeros gives I, a channel that was never active only its damping."""
    diagonal = gram.diagonal()
    mean = float(diagonal.mean()) if len(diagonal) else 0.0
    if not (0.0 <= mean < float("inf") and bool(torch.isfinite(gram).all())):
        raise LilliputError("the Gram matrix of a layer's inputs contains NaN or infinity: check the calibration data")
    matrix = gram.clone()
    matrix.diagonal().add_(damping * mean if mean else 1.0)
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise LilliputError("the Gram matrix of a layer's inputs is not positive definite: raise the option 'damping'")
    return torch.cholesky_inverse(lower)


def _rows(
    work: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, mask: Tensor | None, form: IntegerFormat, o: Options
) -> Tensor:
    """Codes int8 of some rows; `work` [rows, in] is overwritten."""
    rows, width = work.shape
    each = torch.arange(rows, device=work.device)
    inverses = inverse.expand(rows, width, width).clone()
    codes = zero.clone()
    settled = torch.zeros(rows, width, dtype=torch.bool, device=work.device)
    for turn in range(width):
        code = (torch.round(work / scale) + zero).clamp(form.lowest, form.highest)
        code = code if mask is None else torch.where(mask, code, zero)
        miss = work - (code - zero) * scale
        if o.order == "fixed":
            q = torch.full_like(each, turn)
        else:
            loss = miss.square() / inverses.diagonal(dim1=1, dim2=2).clamp(min=1e-300)
            if o.outside_first:
                outside = miss.abs() > 0.5 * scale.abs() * (1 + 1e-9)
                outside = outside if mask is None else outside & mask
                loss = torch.where(outside, -loss, loss)
            q = loss.masked_fill(settled, float("inf")).argmin(1)
        codes[each, q] = code[each, q]
        settled[each, q] = True
        column, pivot = inverses[each, :, q], inverses[each, q, q]
        work = work - (miss[each, q] / pivot)[:, None] * column
        inverses.baddbmm_(column[:, :, None], column[:, None, :] / -pivot[:, None, None])
    return codes.to(torch.int8)


METHOD = Compress(
    paper="Frantar and Alistarh 2022, arXiv 2208.11580",
    options=Options,
    needs=("gram",),
    writes="quantized",
    formats=("int",),
    baseline="rtn",
    covers={"obq": [{"method": "obq", "target": {"bits": 4}}]},
    run=compress,
    scheme=scheme,
    rowwise=True,
)
