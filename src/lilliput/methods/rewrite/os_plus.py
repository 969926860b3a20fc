"""Outlier Suppression+: channels are shifted to their middle and the widest of them narrowed, before they are rounded.

For each norm whose output linears read: z_j = (max X_j + min X_j) / 2 and s_j = max(1, max|X_j - z_j| / t); the norm
gives (X - z) / s, and its readers have W diag(s) and the bias b + W z. The function stays the same; no input exceeds t.
t is the one of `grid` shares of the widest channel (and no narrowing at all) with the least error of the quantized
product, tr(D C DT) + d^2 / 12 N |What|^2, summed over the readers: C is the Gram matrix of the N inputs as they then
are, D the weights' rounding error, and d the step of inputs that share a range, whose rounding counts as independent
noise. The paper rounds samples in its place. With `links: all` scales move between linears, too.

Only a norm with a bias, whose readers have biases, has a place for the shift: OPT's, GPT-2's or BLOOM's. An RMS norm
has none, and z is 0.

Paper: Wei et al. 2023, arXiv 2304.09145.
Cost: grid * min(out, rows) * in^2 multiply-adds for each reader. Limits: extremes are those of the calibration text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.anatomy.model import Linear, Link
from lilliput.folds.kinds import ScaleFold, ShiftFold
from lilliput.formats import known, ranged
from lilliput.machine.cost import Cost
from lilliput.stats.site import SiteStats
from lilliput.streaming.peak import Run
from lilliput.target import Strict, Target
from lilliput.verbs.rewrite import Rewrite
from lilliput.verbs.view import BlockIO, BlockView


class Options(Strict):
    """See the module's docstring."""

    grid: int = Field(20, ge=1, le=200, description="thresholds tried: 1/grid, 2/grid, ... of the widest channel")
    input_bits: int = Field(8, ge=2, le=8, description="of the inputs that a later step rounds")
    links: Literal["norm", "all"] = Field("norm", description="after norms only, or wherever a scale may move")
    shift: bool = Field(True, description="shift channels to their middle where there is a place for it")
    rows: int = Field(256, ge=0, description="judge by this many rows of each linear, evenly spaced (0: all)")


def rewrite(block: BlockView, io: BlockIO, target: Target, o: Options) -> Sequence[ScaleFold | ShiftFold]:
    """A scale, and where there is a place for it a shift before it, per link whose site saw tokens."""
    folds: list[ScaleFold | ShiftFold] = []
    for link in block.anatomy.links:
        stats = io.stats.get(link.site)
        readers = [block.weights[name] for name in link.readers if name in block.weights]
        if (o.links == "norm" and link.kind != "norm") or not readers or stats is None or stats.count == 0:
            continue
        low, high = stats.need("low"), stats.need("high")
        shift = (low + high) / 2 if o.shift and link.shifts else torch.zeros_like(low)
        if bool(shift.any()):
            folds.append(ShiftFold(link, shift))
        reach = link.tie(torch.maximum(high - shift, shift - low))
        folds.append(ScaleFold(link, _narrowed(link, reach, _centred(stats, shift), readers, stats.count, target, o)))
    return folds


def _centred(stats: SiteStats, shift: Tensor) -> Tensor:
    """The Gram matrix of inputs less a shift."""
    cross = stats.count * torch.outer(stats.need("mean"), shift)
    return stats.need("gram") - cross - cross.T + stats.count * torch.outer(shift, shift)


def _narrowed(
    link: Link, reach: Tensor, gram: Tensor, readers: Sequence[Tensor], count: int, target: Target, o: Options
) -> Tensor:
    """The scales of least error; ones where none has less than no scales at all."""
    best, least = torch.ones_like(reach), torch.inf
    some = [w[:: max(1, len(w) // o.rows) if o.rows else 1] for w in readers]
    widest = reach.max()
    for n in range(o.grid, 0, -1) if float(widest) > 0 else ():
        scale = (reach / (widest * n / o.grid)).clamp(min=1.0)  # n = grid: ones
        error = _error(scale, reach, gram, some, count, target, o)
        if error < least:
            best, least = scale, error
    return best


def _error(
    scale: Tensor, reach: Tensor, gram: Tensor, readers: Sequence[Tensor], count: int, target: Target, o: Options
) -> float:
    """What rounding inputs X / s and weights W diag(s) costs the outputs."""
    form = known.from_target(known.fitting(target, len(scale)))
    step = float((reach / scale).max()) * 2 / ((1 << o.input_bits) - 1)
    total = 0.0
    for weight in readers:
        scaled = weight * scale
        grid = ranged.fit(form, scaled, None, ranged.RangeRule("minmax"))
        values = form.decode(form.encode(scaled, grid), grid)
        miss = (scaled - values) / scale
        total += float(((miss @ gram) * miss).sum(dtype=torch.float64))
        total += step * step / 12 * count * float(values.square().sum(dtype=torch.float64))
    return total


def takes(run: Run, linears: Sequence[Linear], o: Options) -> Cost:
    """A trial quantization of the rows that are looked at, and a Gram matrix more."""
    trial = 5 * 4 * max(min(o.rows or x.out_features, x.out_features) * x.in_features for x in linears)
    return Cost(ram=trial + 2 * 4 * max(x.in_features for x in linears) ** 2)


METHOD = Rewrite(
    paper="Wei et al. 2023, arXiv 2304.09145",
    options=Options,
    needs=("low", "high", "mean", "gram"),
    covers={
        "os-plus": [
            {"method": "os-plus"},
            {"method": "rtn", "target": {"bits": 8, "group_size": "channel"}},
            {"method": "act-static-dynamic", "options": {"dynamic": False}},
        ],
    },
    note="os-plus shifts channels only where a norm and all that reads it have biases; elsewhere it scales alone.",
    run=rewrite,
    takes=takes,
)
