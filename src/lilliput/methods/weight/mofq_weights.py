"""MoFQ for weights: each matrix becomes integers or floats of equal width, whichever lose less.

Symmetric integers of b bits, or floats: e2m1 for 4 bits, e3m2 for 6, e4m3 for 8, with the same groups and type of
scales, so that both take the same room; a byte for each matrix says which. Each is fitted on searched ranges and
rounded to nearest, and of D = What - W the smaller decides: sum D^2 (`measure: weights`), or of the outputs, tr(D G DT)
with the Gram matrix G of the inputs (`outputs`). Floats have more levels about 0, and win where weights have heavy
tails, or groups are large; integers where groups are small.

The half for inputs is `mofq`. The paper also measures by the model's output, and adds formats with patterns reused that
mean infinity or NaN: e2m1 and e3m2 have none such, e4m3 has one, which stays.

Paper: Zhang et al. 2023, arXiv 2305.12356.
Cost: two searches of ranges, and for outputs the Gram matrix. Limits: weights are rounded to nearest, without feedback
between columns; only the native layout holds it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.formats import either
from lilliput.formats.format import RangeRule
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import Scheme, quantized
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress


class Options(Strict):
    """See the module's docstring."""

    measure: Literal["weights", "outputs"] = Field("outputs", description="whose squared error decides")
    steps: int = Field(30, ge=1, le=200, description="shrink factors that the search of ranges tries")


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """One part. Raises PlanError for bits or zero points that no float has."""
    return quantized(either.from_target(target))


def reads(o: Options) -> tuple[str, ...]:
    """Outputs need the Gram matrix."""
    return ("gram",) if o.measure == "outputs" else ()


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes for the remainder after the layer's parts, on its support."""
    form = either.from_target(target.model_copy(update={"symmetric": True}))
    weight = layer.rest()
    if layer.support is not None:
        weight = torch.where(layer.support, weight, 0.0)
    measured = o.measure == "outputs" and stats.count > 0
    importance = stats.second_moment() if measured else None
    parts = []
    for grid in form.grids(weight, RangeRule("mse", o.steps), importance):
        parts.append(QuantizedPart(form, form.encode(weight, grid), grid))
    losses = [_loss(part.decode() - weight, stats.need("gram") if measured else None) for part in parts]
    return layer.with_part(parts[losses[1] < losses[0]])


def _loss(change: Tensor, gram: Tensor | None) -> float:
    """Squared error of the weights, or of the outputs where the Gram matrix [in, in] is known."""
    return float((change.square() if gram is None else (change @ gram).mul_(change)).sum(dtype=torch.float64))


METHOD = Compress(
    paper="Zhang et al. 2023, arXiv 2305.12356",
    options=Options,
    needs=("gram",),
    reads=reads,
    writes="quantized",
    formats=("int",),
    covers={},
    run=compress,
    scheme=scheme,
)
