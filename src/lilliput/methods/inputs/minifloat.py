"""Inputs as small floats: fp8, fp6, fp4, and the block formats mxfp8, mxfp6, mxfp4, nvfp4.

A float of e exponent and m mantissa bits has the values +-2^(E-B) (1 + f / 2^m), and below its smallest normal number
+-2^(1-B) f / 2^m; e4m3 ends at 448 (one pattern is NaN, none is infinite), e5m2 at 57344, e2m1 is 0, .5, 1, 1.5, 2, 3,
4, 6. Inputs are divided by a scale, rounded to the nearest value (ties to the even mantissa), and what lies beyond the
ends is cut to them.

The target's format names the values and the scales, as for weights. Plain scales s = max|x| / top are float32, whatever
`scale_dtype` says, for each token (`group_size: channel`), for all inputs (`tensor`) or groups; found while the model
runs, or stored (`dynamic: false`), of a range that is the largest one seen (`range: minmax`), the mean over samples
(`average`), or of least expected squared error (`mse`). The block formats have scales of 8 bits, found while the model
runs: mx ones a power of two for each 32 inputs, 2^(floor(log2 max|x|) - emax) (`power: even`: the exponent that max|x|
would have in the mantissa of the values, which cuts nothing off that would round to the next power of two); nvfp4 an
e4m3 number for each 16, times a stored scale that calibration finds.

zeroquant-fp is a recipe: weights e2m1 with scales that are powers of two, so that their products with e4m3 inputs are
shifts of exponents, a low-rank part for the error, and inputs e4m3 for each token. Its scales are the best ones near
the rule of e8m0, where the paper rounds up.

Papers: Micikevicius et al. 2022, arXiv 2209.05433 (fp8); Rouhani et al. 2023, arXiv 2310.10537 (mx); Wu, Yao and He
2023, ZeroQuant-FP, arXiv 2307.09782.
Cost: none (dynamic), the inputs' extremes or histograms (static, nvfp4).
Limits: scales for all tokens of a forward pass depend on what is batched together. Infinite inputs give NaN, and no
token but those.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats import levels, tables
from lilliput.parts.inputs import minifloat, units
from lilliput.parts.inputs.grid import InputGrid, InputSpec
from lilliput.parts.inputs.minifloat import GLOBAL, SCALE, FloatInput, Kind
from lilliput.parts.layer import Layer
from lilliput.stats import pooled
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.inputs import Inputs

FORMATS = tuple(name for name, preset in levels.PRESETS.items() if preset.table in tables.FLOATS)
_SHARES = 64  # ranges that a search tries
_PLAIN = ("auto", "float16", "bfloat16", "float32")


class Options(Strict):
    """`dynamic` false: the scales are calibrated and stored."""

    dynamic: bool = Field(True, description="scales found while the model runs; false: calibrated and stored")
    range: Literal["minmax", "average", "mse"] = Field("minmax", description="how a static range is chosen")
    power: Literal["floor", "even"] = Field("floor", description="how an e8m0 scale comes from the largest input")
    clip: float = Field(1.0, gt=0.0, le=1.0, description="share of a dynamic range that is covered")


def spec(target: Target, o: Options, width: int) -> InputSpec:
    """The grid. Raises PlanError for what cannot be."""
    full = levels.completed(target)
    table = levels.PRESETS[target.format].table
    if o.dynamic and o.range != "minmax":
        raise PlanError(f"range {o.range} looks at calibration text: set dynamic: false, or leave range out")
    if not o.dynamic and o.clip != 1.0:
        raise PlanError("clip is for dynamic ranges: a static one is chosen by range")
    unit, size = units.of(full, o.dynamic)
    return FloatInput(table, unit, size, _scales(full, o), o.dynamic, o.clip)


def _scales(full: Target, o: Options) -> Kind:
    if full.scale_dtype in _PLAIN:
        if o.power != "floor":
            raise PlanError("power is about e8m0 scales: leave it out, or take format mxfp4, mxfp6 or mxfp8")
        return "float32"
    if full.scale_dtype == "e8m0":
        return "e8m0" if o.power == "floor" else "e8m0-even"
    if full.scale_dtype == "e4m3":
        return "e4m3"
    raise PlanError(f"scales of inputs cannot be '{full.scale_dtype}': choose float32, e8m0 or e4m3")


def inputs(layer: Layer, stats: SiteStats, target: Target, o: Options) -> InputGrid:
    """The grid of a layer's inputs, with the scales that text decides."""
    form = spec(target, o, stats.width)
    if not isinstance(form, FloatInput):
        raise TypeError(f"{form.describe()} is no small float")
    table = tables.of(form.table, int(form.bits))
    if form.scales == "e4m3":
        low, high = pooled.extremes(stats, 1)
        return InputGrid(form, {GLOBAL: minifloat.whole(torch.maximum(-low, high), table.top).cpu()})
    if o.dynamic:
        return InputGrid(form)
    count = units.count(form.granularity, form.group_size, stats.width)
    if o.range == "mse":
        largest = pooled.largest(stats, count)
        peak = _searched(*pooled.points(pooled.counts(stats.need("histogram"), count), largest), largest, form)
    else:
        low, high = pooled.extremes(stats, count, o.range)
        peak = torch.maximum(-low, high)
    return InputGrid(form, {SCALE: form.scale(peak, table.top).cpu()})


def _searched(sizes: Tensor, counts: Tensor, largest: Tensor, form: FloatInput) -> Tensor:
    """Of shares of the largest inputs [n], those of least expected squared error; see `pooled.points`."""
    table = tables.of(form.table, int(form.bits), (), str(sizes.device))
    best, least = largest, torch.full_like(largest, torch.inf, dtype=torch.float64)
    for step in range(_SHARES):  # over six octaves: floats lose little by a range that is too wide
        peak = largest * 2.0 ** (-step * 6 / _SHARES)
        scale = form.scale(peak, table.top)[:, None]
        values = (sizes / scale).float()
        table.snap(values)
        error = (counts * (values.double() * scale - sizes).square()).sum(1)
        best, least = torch.where(error < least, peak, best), torch.minimum(error, least)
    return best


def reads(o: Options) -> tuple[str, ...]:
    """What static ranges look at."""
    if o.dynamic:
        return ()
    return {"minmax": ("low", "high"), "average": ("extremes",)}.get(o.range, ("absmax", "histogram"))


def besides(target: Target) -> tuple[str, ...]:
    """The global scale of nvfp4 is that of the largest input."""
    return ("low", "high") if levels.completed(target).scale_dtype == "e4m3" else ()


METHOD = Inputs(
    paper="Micikevicius et al. 2022, arXiv 2209.05433",
    options=Options,
    needs=("low", "high", "extremes", "absmax", "histogram"),
    reads=reads,
    besides=besides,
    formats=FORMATS,
    default={"format": "fp8"},
    covers={
        "minifloat": [
            {"method": "rtn", "target": {"format": "fp8"}},
            {"method": "minifloat", "target": {"format": "fp8"}},
        ],
        "zeroquant-fp": [
            {"method": "rtn", "target": {"format": "e2m1", "group_size": 32, "scale_dtype": "e8m0"}},
            {"method": "lorc", "target": {"rank": 8}},
            {"method": "minifloat", "target": {"format": "e4m3"}},
        ],
    },
    run=inputs,
    spec=spec,
)
