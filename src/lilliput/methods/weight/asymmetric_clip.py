"""Asymmetric clipping: both ends of each group's range are cut to what lowers the error of its outputs most.

For the weights w [n] of a group, with the inputs X of those n columns:

    a*, b* = argmin over a, b of |(Q(clip(w, b min w, a max w)) - w) X|^2 = e G eT,    G = X XT of the group,

a and b on a grid of `steps` shares from 1 down to 1 - `shrink`; Q takes the cut range as that of its codes. Then each
weight takes its nearest code. (The range searches of rtn and awq shrink both ends alike, and know X by the mean squares
of its columns alone.)

Paper: BitDistiller, Du et al. 2024, arXiv 2402.10631, whose training starts from it. Cost: steps^2 roundings, with 2 n
operations a weight for each. Limits: integers, in groups or rows; a symmetric grid has one end to cut; the paper's
NormalFloat of 3 bits with a scale for each sign is no format here.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import ranges
from lilliput.errors import LilliputError
from lilliput.formats import groups
from lilliput.formats.integer import IntegerFormat, IntegerGrid, from_target
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import Scheme, quantized
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

_CHUNK = 1 << 19  # weights worked on at a time


class Options(Strict):
    """See the module's docstring."""

    steps: int = Field(10, ge=1, le=100, description="shares that are tried for each end of a range")
    shrink: float = Field(0.5, ge=0.0, lt=1.0, description="how much of a range may be cut off at each end")


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """Integers. Raises PlanError for others."""
    return quantized(from_target(target))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes for the remainder after the layer's parts, on its support. Raises LilliputError for values that are not
    finite."""
    form = from_target(target)
    weight = layer.rest()
    if layer.support is not None:
        weight = torch.where(layer.support, weight, 0.0)
    gram = stats.need("gram").float()
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(gram).all()):
        raise LilliputError(f"{layer.name}: the weight or its Gram matrix contains NaN or infinity")
    rows, width = weight.shape
    shape = groups.units(rows, width, form.group_size)
    scale, zero = weight.new_empty(shape), weight.new_empty(shape)
    step = max(1, _CHUNK // max(width, 1))
    if form.group_size == 0:
        scale, zero = (x[:1, None] for x in _search(weight, gram, form, o, shared=True))
    for columns, units, size in groups.pieces(width, form.group_size) if form.group_size else ():
        for number in range(units.start, units.stop):
            first = columns.start + (number - units.start) * size
            part = slice(first, first + size)
            for a in range(0, rows, step):
                some = slice(a, a + step)
                scale[some, number], zero[some, number] = _search(weight[some, part], gram[part, part], form, o)
    ranges.check(weight, scale, str(form.scale_dtype).removeprefix("torch."))
    grid = IntegerGrid(scale.to(form.scale_dtype), None if form.symmetric else zero.to(torch.int8))
    return layer.with_part(QuantizedPart(form, form.encode(weight, grid), grid))


def _search(
    weight: Tensor, gram: Tensor, form: IntegerFormat, o: Options, *, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale, as stored, and zero point [rows] of one group, weight [rows, n]; shared: all rows have the same."""
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if shared:
        low, high = low.min().expand_as(low), high.max().expand_as(high)
    shares = [1 - o.shrink * n / o.steps for n in range(o.steps)]
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for upper in shares:
        for lower in shares[:1] if form.symmetric else shares:
            if form.symmetric:
                s = ranges.stored(upper * torch.maximum(high, -low) / form.highest, form.scale_dtype)
                z = zero
            else:
                s = ranges.stored((upper * high - lower * low) / (form.highest - form.lowest), form.scale_dtype)
                z = (form.lowest - lower * low / s).round().clamp(form.lowest, form.highest)
            codes = (weight / s[:, None]).round().add_(z[:, None]).clamp_(form.lowest, form.highest)
            error = codes.sub_(z[:, None]).mul_(s[:, None]).sub_(weight)
            loss = ((error @ gram) * error).sum(1)
            if shared:
                loss = loss.sum().expand_as(loss)
            better = loss < best
            best = torch.where(better, loss, best)
            scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


METHOD = Compress(
    paper="Du et al. 2024 (BitDistiller), arXiv 2402.10631",
    options=Options,
    needs=("gram",),
    writes="quantized",
    formats=("int",),
    recipe=[{"method": "asymmetric-clip", "target": {"bits": 3, "group_size": 64, "symmetric": False}}],
    baseline="rtn",
    covers={
        "bitdistiller": [
            {"method": "asymmetric-clip", "target": {"bits": 2, "group_size": 64, "symmetric": False}},
            {
                "method": "lsq",
                "options": {"grid": "anew", "start": "original", "objective": "cakld", "data": "self", "lr": 8e-6},
            },
        ],
    },
    run=compress,
    scheme=scheme,
    rowwise=True,
    scratch=16 << 20,  # bytes: a few copies of the weights worked on at a time
)
