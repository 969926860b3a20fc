"""Quantile quantization: every level stands for the same number of weights.

With Q the empirical quantile function of a unit's n weights (a tensor, a row, or a group of inputs), linear between
neighbours, the levels are c_k = (Q(k / 2^b) + Q((k + 1) / 2^b)) / 2, k = 0 .. 2^b - 1, and each weight goes to the
nearest. All levels but the outermost are used about equally often, so the codes carry nearly b bits of information.

Paper: Dettmers et al. 2022 (8-bit optimizers via block-wise quantization), arXiv 2110.02861. The paper divides by
2^b + 1, which leaves one part of the largest weights without a level; here all parts have one. Its 8-bit block-wise
code, a fixed dynamic tree scaled by the absolute maximum of a block, is `rtn` with format dynamic8.
Cost: a sort of each unit. Limits: data free; equal use is not least error: levels crowd where there are many weights,
and large weights are far from theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.errors import LilliputError
from lilliput.formats import groups
from lilliput.formats.codebook import from_target
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

_CHUNK = 1 << 18  # weights sorted at a time, in float64


class Options(Strict):
    """None."""


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes for the remainder after the layer's parts; outside the support they decode to 0.

    Raises PlanError without bits in the target, LilliputError for a weight that is not finite.
    """
    form = from_target(target)
    weight = layer.rest()
    holes = None if layer.support is None else ~layer.support
    if holes is not None:
        weight = weight.masked_fill(holes, 0.0)
    if not bool(torch.isfinite(weight).all()):
        raise LilliputError(f"{layer.name}: the weight contains NaN or infinity: it cannot be quantized")
    rows, width = weight.shape
    if form.group_size == 0:
        levels = _levels(weight.reshape(1, -1), form.levels, None if holes is None else holes.reshape(1, -1))[:, None]
    else:
        levels = weight.new_empty(rows, groups.count(width, form.group_size), form.levels)
        step = max(1, _CHUNK // max(width, 1))
        for columns, some, size in groups.pieces(width, form.group_size):
            for a in range(0, rows, step):
                part = slice(a, a + step)
                gaps = None if holes is None else holes[part, columns].reshape(-1, size)
                middles = _levels(weight[part, columns].reshape(-1, size), form.levels, gaps)
                levels[part, some] = middles.view(-1, some.stop - some.start, form.levels)
    table = form.table(levels)
    return layer.with_part(QuantizedPart(form, form.encode(weight, table), table))


def _levels(values: Tensor, count: int, holes: Tensor | None) -> Tensor:
    """Midpoints [units, count] of neighbouring quantiles of values [units, n]; 0 is among them where there is a
    hole."""
    ordered = values.double().sort(1).values
    last = ordered.shape[1] - 1
    at = torch.arange(count + 1, dtype=torch.float64, device=values.device) / count * last
    below = at.floor().long()
    share = at - below
    quantile = ordered[:, below] * (1 - share) + ordered[:, (below + 1).clamp(max=last)] * share
    levels = (quantile[:, 1:] + quantile[:, :-1]) / 2
    if holes is not None:
        nearest = levels.abs().argmin(1, keepdim=True)
        levels = torch.where(holes.any(1, keepdim=True), levels.scatter(1, nearest, 0.0), levels)
    return levels.float()


METHOD = Compress(
    paper="Dettmers et al. 2022, arXiv 2110.02861",
    options=Options,
    needs=(),
    writes="quantized",
    formats=("codebook",),
    covers={
        "quantile-quant": [
            {"method": "quantile-quant", "target": {"format": "codebook", "bits": 4, "group_size": "channel"}}
        ],
    },
    run=compress,
    rowwise=True,
)
