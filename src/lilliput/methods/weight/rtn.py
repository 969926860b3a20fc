"""Round to nearest: every weight to its closest code, by itself.

For each unit u of weights that share a scale (uniform affine quantizer): asymmetric lo = min(0, min u),
hi = max(0, max u), S = (hi - lo) / (2^b - 1), Z = round(-lo / S); symmetric S = max|u| / (2^(b-1) - 1), Z = 0;
q = clip(round(w / S) + Z), what is computed with is S (q - Z). Clip search shrinks [lo, hi] and keeps, per unit, the
range of least sum h_j |w_j - S (q_j - Z)|^p, with h = 1, or h_j = mean x_j^2 over the calibration tokens.

Other formats have other levels than S (q - Z): `formats.levels` and `formats.scales` say which, and what their scales
are; the search means the same there. Two searches cut the weights of a unit before min-max covers the rest:
"percentile" at a percentile of |w|, "kl" at the share of the row's ranges that changes the histogram of |w|, in 2048
bins, least by its KL divergence from what the levels can tell apart.

The only difference between post-training quantization and quantization-aware training (`ptq-vs-qat`) is whether
parameters are trained with the rounding in place. All methods here are of the first kind: they read a finished model
and at most some calibration text. `signround`, `adaround` and `flexround` use gradients, of one block's outputs and of
rounding alone; `spinquant` learns a rotation. Nothing here trains the weights on a loss of the whole model; a written
folder is where such a training would start.

What is quantized (`wo-vs-wa`): weights alone, W4A16, save memory and the time to read it, and multiply in 16 bits;
weights and inputs, W8A8, also multiply in 8 bits where the hardware can: a step of the verb inputs, such as
act-static-dynamic, behind that of the weights; keys and values in the cache, KV8, are a third choice. Without such a
step inputs stay in the model's own type, whatever `bits` says.

"Fake" quantization decodes codes and multiplies floats; integer execution (`fake-vs-integer`) multiplies codes, y = S_x
S_w sum_j x_j w_j in 32-bit integers, and gives the same up to the rounding of floats. Every folder written here runs by
the first, rounded inputs or not; the second needs integer kernels, which are an engine's.

Paper: Jacob et al. 2018, arXiv 1712.05877 (the quantizer); GLM-130B, arXiv 2210.02414 (row-wise int4).
Cost: O(out * in) for min-max, `steps` times that for the search. Limits: errors of a row's weights are not balanced
against each other; at 3 bits large models break.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats import clip, ranged
from lilliput.formats.format import Format
from lilliput.formats.known import from_target
from lilliput.formats.ranged import Ranged
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import Scheme, quantized
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

NEEDS = ("square",)


def _recipe(
    bits: int = 4, group_size: str | int = "auto", symmetric: bool = True, search: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    target = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    options = {"importance": False, **(search or {"search": "minmax"})}
    return [{"method": "rtn", "target": target, "options": options}]


class Options(Strict):
    """`search`: range by min-max or by least weighted error; `importance`: weigh errors by the inputs' mean square."""

    search: Literal["minmax", "mse", "percentile", "kl"] = Field(
        "mse", description="range of a group: min-max, of least error, or cut by how its weights are distributed"
    )
    importance: bool = Field(True, description="in the search, weight input j by its mean square")
    steps: int = Field(30, ge=1, le=200, description="shrink factors that the search (mse, kl) tries")
    percentile: float = Field(99.9, gt=0.0, le=100.0, description="search percentile: the percentile of |w| to cover")
    norm: float = Field(2.0, ge=1.0, le=4.0, description="exponent of the error in the search")
    signed_scale: bool = Field(
        False, description="allow negative symmetric scales, so that the extra code can be on either side"
    )


def needs(o: Options) -> tuple[str, ...]:
    """Only an error that is weighted by the inputs takes calibration."""
    return NEEDS if o.importance and o.search == "mse" else ()


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """One part on the target's grid. Raises PlanError for options that the grid does not have."""
    form = from_target(target)
    ranged.check(form, _search(o))
    if o.search in ("percentile", "kl"):
        _positive(form)
    return quantized(form)


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes for the remainder after the layer's parts, on its support. Raises PlanError without bits in the target."""
    weight = layer.rest()
    if layer.support is not None:
        weight = torch.where(layer.support, weight, 0.0)
    form = from_target(target)
    importance = stats.second_moment() if needs(o) and stats.count else None
    grid = ranged.fit(form, _clipped(weight, form, o), importance, _search(o), layer.support)
    return layer.with_part(QuantizedPart(form, form.encode(weight, grid), grid))


def _search(o: Options) -> ranged.RangeRule:
    return ranged.RangeRule("mse" if o.search == "mse" else "minmax", o.steps, o.norm, o.signed_scale)


def _clipped(weight: Tensor, form: Format, o: Options) -> Tensor:
    if o.search not in ("percentile", "kl"):
        return weight
    size, levels = _positive(form)
    if not bool(torch.isfinite(weight).all()):
        return weight  # the fit names what is wrong with it
    if o.search == "percentile":
        return clip.percentile(weight, size, o.percentile)
    return clip.divergence(weight, size, levels, o.steps)


def _positive(form: Format) -> tuple[int, Tensor]:
    """Group size, and the levels from 0 up. Raises PlanError for a format without ranges."""
    if not isinstance(form, Ranged):
        raise PlanError(f"{form.describe()} has no ranges to cut: take search minmax or mse")
    return form.group_size, form.magnitudes()


METHOD = Compress(
    paper="Jacob et al. 2018, arXiv 1712.05877",
    options=Options,
    needs=NEEDS,
    reads=needs,
    writes="quantized",
    covers={
        "rtn": [{"method": "rtn", "target": {"bits": 4}}],
        "uniform-affine": _recipe(symmetric=False),
        "sym-asym": _recipe(symmetric=True),
        "granularity": _recipe(symmetric=False, group_size="channel"),
        "range-calibration": _recipe(symmetric=False, search={"search": "mse", "norm": 2.4, "steps": 80}),
        "glm130b-rowwise": _recipe(group_size="channel"),
        "nf4": [{"method": "rtn", "target": {"format": "nf4"}, "options": {"search": "minmax", "importance": False}}],
        "double-quant": [
            {
                "method": "rtn",
                "target": {"format": "nf4", "scale_dtype": "int8/256"},
                "options": {"search": "minmax", "importance": False},
            }
        ],
        "vs-quant": [{"method": "rtn", "target": {"bits": 4, "group_size": 16, "scale_dtype": "int4/row"}}],
        "zeroquant-v2": _recipe(bits=8, group_size="channel"),
        "code-model-quant": _recipe(bits=8, group_size=32),
        "edge-quant-apps": _recipe(group_size=32),
        "fake-vs-integer": "its integer half, y = S_x S_w times a product of codes, needs integer kernels, which are "
        "not here yet; every recipe runs the fake half",
        "ptq-vs-qat": None,
        "wo-vs-wa": None,
    },
    run=compress,
    scheme=scheme,
    rowwise=True,
)
