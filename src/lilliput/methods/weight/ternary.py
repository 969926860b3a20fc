"""Ternary weights: -s, 0 or s in every group, the scale of least error, codes by the GPTQ sweep.

s minimises sum_j h_j (w_j - s c_j)^2 over all codes c_j of -1, 0, 1: the k largest |w| are kept, s = sum h|w| / sum h
over them, and every k is tried (the paper's threshold 0.7 mean|w| is close to it for normal weights). h_j = sum x_j^2.
With `sweep`, which is no part of the paper, the codes are then chosen as in `gptq`; without it each weight takes its
nearest.

Paper: Li et al. 2016, arXiv 1605.04711.
Cost: one sort of each group, and the sweep of gptq. Limits: 1.6 bits a weight and 16 a group; without training only the
largest models survive it.
"""

from __future__ import annotations

import torch
from pydantic import Field

from lilliput.algebra import obs, values
from lilliput.formats import groups
from lilliput.formats.ternary import from_target
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

NEEDS = ("gram",)


class Options(Strict):
    """See the module's docstring."""

    importance: bool = Field(True, description="weight input j by its sum of squares")
    sweep: bool = Field(True, description="choose the codes by the GPTQ sweep; scales stay")
    act_order: bool = Field(True, description="sweep the inputs by decreasing mean square")
    damping: float = Field(0.01, ge=0.0, le=10.0, description="added to the Gram diagonal, as a share of its mean")
    shrinkage: float = Field(
        0.2, ge=0.0, le=10.0, description="added to each Gram diagonal entry, as a share of itself"
    )


def needs(o: Options) -> tuple[str, ...]:
    """Without importance and sweep nothing is calibrated."""
    return NEEDS if o.importance or o.sweep else ()


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes for the remainder after the layer's parts, 0 outside the support. Raises LilliputError for values that are
    not finite."""
    form = from_target(target)
    weight = layer.rest()
    supported = weight if layer.support is None else torch.where(layer.support, weight, 0.0)
    gram = stats.need("gram") if needs(o) else None
    importance = None
    if gram is not None and o.importance:
        importance = gram.diagonal() + o.damping * gram.diagonal().mean()
    grid = form.fit(supported, importance=importance)
    if gram is None or not o.sweep:
        return layer.with_part(QuantizedPart(form, form.encode(supported, grid), grid))
    order = gram.diagonal().argsort(descending=True, stable=True) if o.act_order else None
    factor = obs.factorize(gram, o.damping, order, o.shrinkage)
    index = groups.index(weight.shape[1], form.group_size)
    visits = (index if order is None else index[order.cpu()]).tolist()

    def rounding(a: int, b: int) -> obs.Nearest:
        return values.Levels.of(form.levels(grid.rows(a, b)), visits)

    rounded = values.sweep(weight, factor, order, rounding, support=layer.support)
    return layer.with_part(QuantizedPart(form, form.encode(rounded, grid), grid))


METHOD = Compress(
    paper="Li et al. 2016, arXiv 1605.04711",
    options=Options,
    needs=NEEDS,
    reads=needs,
    writes="quantized",
    formats=("ternary",),
    covers={
        "ternary": [{"method": "ternary", "target": {"format": "ternary"}}],
    },
    run=compress,
    rowwise=True,
    scratch=16 << 20,  # bytes beside what the plan counts for a sweep (measured)
)
