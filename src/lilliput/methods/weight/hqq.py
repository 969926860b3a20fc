"""HQQ: the grid of least l_p error of the weights, p < 1, which lets outliers be wrong; no data.

min over S, Z of sum |w - S (q - Z)|^p by half-quadratic splitting, in code units: with e the rounding error, the
shrinkage e' = sign(e) max(|e| - |e|^(p-1) / beta, 0) takes the large errors for outliers and out of the way; then, for
the codes q as they are, Z = mean(q - (w / S - e')) and beta grows by kappa. Format affine keeps Z as it is found, in
half precision, as the paper does; format int, which engines know, rounds it. With `scale` the scale takes part too:
S = sum c (w - S e') / sum c^2 with c = q - Z, as stored. That lowers the l_p error and, on a real model at 3 bits,
raises the loss. Of all grids seen each unit keeps the one of least l_p error, its start included.

Paper: Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/ (scales fixed).
Cost: O(iters * out * in), no calibration. Limits: it does not know which inputs matter.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import ranges as search
from lilliput.formats import affine, integer
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.rounding import Units
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

_CHUNK = 1 << 17  # weights worked on at a time


class Options(Strict):
    """The exponent, and how the splitting proceeds."""

    norm: float = Field(0.7, gt=0.0, le=1.0, description="p, the exponent of the error")
    iters: int = Field(20, ge=0, le=1000, description="rounds of shrinkage and update")
    beta: float = Field(10.0, gt=0.0, description="initial weight of the splitting")
    kappa: float = Field(1.05, ge=1.0, le=10.0, description="its growth in each round")
    scale: bool = Field(False, description="move scales too, not only zero points: gives up more outliers")
    start: Literal["minmax", "mse"] = Field("mse", description="the first grid: min-max, or of least squared error")


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes for the remainder after the layer's parts, on its support. Raises PlanError without bits in the target."""
    weight = layer.rest()
    if layer.support is not None:
        weight = torch.where(layer.support, weight, 0.0)
    return layer.with_part((_affine if target.format == "affine" else _integer)(weight, target, o))


def _affine(weight: Tensor, target: Target, o: Options) -> QuantizedPart:
    form = affine.from_target(target)
    grid = form.fit(weight, search=o.start == "mse")
    scale, zero = _fitted(weight, grid.scale.float(), grid.zero.float(), form.codes, o, True)
    fitted = affine.AffineGrid(scale.to(form.scale_dtype), zero.to(form.scale_dtype))
    return QuantizedPart(form, form.encode(weight, fitted), fitted)


def _integer(weight: Tensor, target: Target, o: Options) -> QuantizedPart:
    form = integer.from_target(target)
    grid = form.fit(weight, search=o.start)
    scale = grid.scale.float()
    zero = torch.zeros_like(scale) if grid.zero is None else grid.zero.float()
    scale, zero = _fitted(weight, scale, zero, form, o, False)
    fitted = integer.IntegerGrid(scale.to(form.scale_dtype), None if form.symmetric else zero.to(torch.int8))
    return QuantizedPart(form, form.encode(weight, fitted), fitted)


def _fitted(
    weight: Tensor, scale: Tensor, zero: Tensor, form: IntegerFormat, o: Options, real: bool
) -> tuple[Tensor, Tensor]:
    """`splitting` of all rows, few at a time."""
    fitted = scale.clone(), zero.clone()
    for rows, units in Units(form, *weight.shape).pieces_with_units(_CHUNK):
        fitted[0][rows], fitted[1][rows] = splitting(weight[rows], scale[rows], zero[rows], units, o, real)
    return fitted


def splitting(
    weight: Tensor, scale: Tensor, zero: Tensor, units: Units, o: Options, real: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero of least l_p error among those that the rounds meet, as stored, float32 [units].

    weight [rows, in] and the grid that it starts from; `real`: zero points are no integers.
    """
    exact, code = _codes(weight, scale, zero, units)
    best, best_grid, beta = _error(exact, code, scale, units, o.norm), (scale, zero), o.beta
    for _ in range(o.iters):
        scale, zero = _update(exact, code, scale, zero, units, o, beta, real)
        exact, code = _codes(weight, scale, zero, units)
        error = _error(exact, code, scale, units, o.norm)
        better = error < best
        best = torch.where(better, error, best)
        best_grid = torch.where(better, scale, best_grid[0]), torch.where(better, zero, best_grid[1])
        beta *= o.kappa
    return best_grid


def _error(exact: Tensor, code: Tensor, scale: Tensor, units: Units, norm: float) -> Tensor:
    """Sum of |error|^norm, float32 [units]."""
    return _sum(units, (code - exact).abs_().pow_(norm)) * scale.abs().pow(norm)


def _update(
    exact: Tensor, code: Tensor, scale: Tensor, zero: Tensor, units: Units, o: Options, beta: float, real: bool
) -> tuple[Tensor, Tensor]:
    """One round: the next scale and zero."""
    form = units.form
    assert isinstance(form, IntegerFormat)  # as `_fitted` has it
    miss = exact - code
    size = miss.abs()
    large = miss.sign() * (size - size.clamp(min=1e-8).pow_(o.norm - 1).div_(beta)).clamp_(min=0.0)
    aim = exact - large
    new_zero = zero
    if not form.symmetric:
        new_zero = zero + _sum(units, code - aim) / _sum(units, torch.ones_like(exact))
        whole = new_zero.round().clamp_(form.lowest, form.highest)
        new_zero = new_zero.to(form.scale_dtype).float() if real else whole
    if not o.scale:
        return scale, new_zero
    # Codes keep their meaning: q is what it was, c = q - Z moves with Z.
    code = code + units.spread(zero - new_zero)
    top, bottom = _sum(units, code * aim), _sum(units, code.square())
    factor = torch.where((top > 0) & (bottom > 0), top / bottom, 1.0)
    return search.stored(scale * factor, form.scale_dtype), new_zero


def _codes(weight: Tensor, scale: Tensor, zero: Tensor, units: Units) -> tuple[Tensor, Tensor]:
    """w / S, and the centred code that it rounds to, float32 [out, in]."""
    exact = weight * units.spread(scale.reciprocal())
    low = units.spread(units.form.lowest - zero)
    part = zero - zero.round()
    if bool(part.any()):
        off = units.spread(part)
        code = (exact + off).round_().sub_(off)
    else:
        code = exact.round()
    return exact, torch.minimum(torch.maximum(code, low), low + (units.form.highest - units.form.lowest))


def _sum(units: Units, values: Tensor) -> Tensor:
    """Sums over the weights of each unit, [units]."""
    sums = units.gather(values)
    return sums.sum(0, keepdim=True) if units.shape[0] == 1 else sums


METHOD = Compress(
    paper="Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/",
    options=Options,
    needs=(),
    writes="quantized",
    formats=("int", "affine"),
    covers={
        "hqq": [{"method": "hqq", "target": {"format": "affine", "bits": 4, "group_size": 64}}],
    },
    run=compress,
    rowwise=True,
)
