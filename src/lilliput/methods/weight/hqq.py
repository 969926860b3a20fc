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

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra.rounding import Units
from lilliput.formats import affine, integer, search
from lilliput.formats.affine import AffineFormat
from lilliput.formats.integer import Grid
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.recipe import Strict, Target
from lilliput.stats.site import SiteStats

PAPER = "Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/"
NEEDS: tuple[str, ...] = ()
WRITES: Literal["quantized"] = "quantized"
FORMATS = ("int", "affine")
ROWWISE = True
BASELINE: str | None = None
COVERS: Mapping[str, list[dict[str, Any]] | None] = {
    "hqq": [{"method": "hqq", "target": {"format": "affine", "bits": 4, "group_size": 64}}],
}


class Options(Strict):
    """The exponent, and how the splitting proceeds."""

    norm: float = Field(0.7, gt=0.0, le=1.0, description="p, the exponent of the error")
    iters: int = Field(20, ge=0, le=1000, description="rounds of shrinkage and update")
    beta: float = Field(10.0, gt=0.0, description="weight of the splitting at first")
    kappa: float = Field(1.05, ge=1.0, le=10.0, description="its growth at each round")
    scale: bool = Field(False, description="move scales too, not zero points alone: gives up more outliers")
    start: Literal["minmax", "mse"] = Field("mse", description="the first grid: covering, or of least squared error")


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes for what the layer's parts leave over, on its support. Raises PlanError without bits in the target."""
    weight = layer.rest()
    if layer.support is not None:
        weight = torch.where(layer.support, weight, 0.0)
    form = affine.from_target(target) if target.format == "affine" else integer.from_target(target)
    real = isinstance(form, AffineFormat)
    units = Units(form.codes if isinstance(form, AffineFormat) else form, *weight.shape)
    grid: Grid | affine.Grid
    if isinstance(form, AffineFormat):
        grid = form.fit(weight, search=o.start == "mse")
    else:
        grid = form.fit(weight, search=o.start)
    scale = grid.scale.float()
    zero = torch.zeros_like(scale) if grid.zero is None else grid.zero.float()
    best, kept = error(weight, scale, zero, units, o.norm), (scale, zero)
    beta = o.beta
    for _ in range(o.iters):
        scale, zero = update(weight, scale, zero, units, o, beta, real)
        seen = error(weight, scale, zero, units, o.norm)
        better = seen < best
        best = torch.where(better, seen, best)
        kept = torch.where(better, scale, kept[0]), torch.where(better, zero, kept[1])
        beta *= o.kappa
    stored = kept[0].to(form.scale_dtype)
    if isinstance(form, AffineFormat):
        found = affine.Grid(stored, kept[1].to(form.scale_dtype))
        return layer.with_part(QuantizedPart(form, form.encode(weight, found), found))
    whole = Grid(stored, None if form.symmetric else kept[1].to(torch.int8))
    return layer.with_part(QuantizedPart(form, form.encode(weight, whole), whole))


def error(weight: Tensor, scale: Tensor, zero: Tensor, units: Units, norm: float) -> Tensor:
    """Sum of |error|^norm, float32 [units]."""
    exact, code = _codes(weight, scale, zero, units)
    return _sum(units, code.sub_(exact).abs_().pow_(norm)) * scale.abs().pow(norm)


def update(
    weight: Tensor, scale: Tensor, zero: Tensor, units: Units, o: Options, beta: float, real: bool = False
) -> tuple[Tensor, Tensor]:
    """One round: the next scale and zero, as stored, float32 [units]; `real`: the zero is no integer."""
    exact, code = _codes(weight, scale, zero, units)
    miss = exact - code
    size = miss.abs()
    large = miss.sign() * (size - size.clamp(min=1e-8).pow(o.norm - 1) / beta).clamp_(min=0.0)
    wanted = exact - large
    moved = zero
    if not units.form.symmetric:
        count = _sum(units, torch.ones_like(weight))
        moved = zero + _sum(units, code - wanted) / count
        if real:
            moved = moved.to(units.form.scale_dtype).float()
        else:
            moved = moved.round().clamp_(units.form.lowest, units.form.highest)
        # Codes keep their meaning: q is what it was, c = q - Z moves with Z.
        code = code + units.spread(zero - moved)
    if not o.scale:
        return scale, moved
    top, bottom = _sum(units, code * wanted), _sum(units, code.square())
    factor = torch.where((top > 0) & (bottom > 0), top / bottom, 1.0)
    return search.stored(scale * factor, units.form.scale_dtype), moved


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
