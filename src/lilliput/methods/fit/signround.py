"""SignRound: rounding offsets and clip ranges of a whole block, trained by the sign of the gradient.

For each unit of weights that share a scale: q = clip(round(w / S + V) + Z), What = S (q - Z), with V in [-1/2, 1/2] for
each weight, S = (s hi - t lo) / (2^bits - 1) and Z = lowest - round(t lo / S), s and t being factors on the ends of the
start's range [lo, hi] (symmetric grids: one factor on S). The mean squared error of the block's outputs goes down by
signed steps theta -= lr sign(dL/dtheta), lr falling, gradients straight through every rounding; the best state is kept.
Without an earlier step it starts at V = 0 on the grid of least weighted error, or, with start=minmax, on the covering
one: that is the paper's, which bounds s and t by 1.

Beyond the paper: after a step that quantizes, such as gptq, it continues from that step's codes c and grid. It then
rounds u + V, where u does not move with S: the code itself (margin=1), or as far towards w / S as rounds to the same
code (margin=0). S then only scales the codes. Most of the gain comes from the scales.

Paper: Cheng et al. 2024, arXiv 2309.05516.
Cost: iters times a forward and backward pass of `batch` samples through the block. Limits: integers and ggml's types,
whose super-blocks keep their steps while the integers on them move; it fits the calibration text, so few samples and
many steps read too much into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.formats import rounding
from lilliput.formats.ggml_bytes import KINDS
from lilliput.target import Target
from lilliput.training import block as blockfit
from lilliput.training.block import FitOptions, Start
from lilliput.training.descent import looks
from lilliput.training.minimise import Parameter, Schedule
from lilliput.verbs.fit import Fit
from lilliput.verbs.view import BlockFit, FitBlock, FitIO

_LEAST = 0.05  # of a clip factor


class Options(FitOptions):
    """With start=minmax the rates default to the paper's: `lr` to 1 / iters, so that an offset can just travel half a
    step of the grid, and `minmax_lr` to lr. Elsewhere the grid is good already: 0.6 / iters and 0.08 / iters."""

    minmax_lr: float | None = Field(None, gt=0.0, description="the same for the clip factors")
    rule: Literal["sign", "adam"] = Field("sign", description="signed steps as in the paper, or Adam")
    clip: bool = Field(True, description="train the clip factors too")
    margin: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="where a code of an earlier step starts: 0 at the edge next to the weight, 1 in its middle",
    )


@dataclass(frozen=True)
class Rounder:
    """Rows of a linear: offsets, and factors of its range's upper and lower end."""

    start: Start
    offset: Parameter  # V, float32 [out, in]
    origin: Tensor | None  # position that V is added to (None: w / S)
    upper: Parameter | None  # float32 [units]
    lower: Parameter | None  # None for symmetric grids

    @property
    def parameters(self) -> Sequence[Parameter]:
        return [p for p in (self.offset, self.upper, self.lower) if p is not None]

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale, as stored, and zero point, float32 [units]; differentiable."""
        if self.upper is None:
            return self.start.scale, self.start.zero
        return self.start.clipped(self.upper.value, None if self.lower is None else self.lower.value)

    def position(self, scale: Tensor) -> Tensor:
        if self.origin is not None:
            return self.offset.value + self.origin
        return torch.addcmul(self.offset.value, self.start.weight, self.start.units.spread(scale.reciprocal()))

    def weight(self) -> Tensor:
        scale, zero = self.grid()
        return self.start.masked(rounding.rounded(self.position(scale), scale, zero, self.start.units))

    def finish(self) -> tuple[Tensor, Any]:
        with torch.no_grad():
            scale, zero = self.grid()
            return rounding.encode(self.position(scale), scale, zero, self.start.units, self.start.grid)


def begin(start: Start, o: Options) -> Rounder:
    """Rows of a linear at their start."""
    count = max(o.iters, 1)
    wide = o.start == "minmax" and not start.continued
    rate = o.lr if o.lr is not None else (1.0 if wide else 0.6) / count
    slow = o.minmax_lr if o.minmax_lr is not None else rate if wide else 0.08 / count
    offset = Parameter(torch.zeros_like(start.weight, requires_grad=True), rate, -0.5, 0.5)
    uneven = start.units.form.levels(start.weight.device) is not None
    origin = start.origin(o.margin) if start.continued or uneven else None
    upper = lower = None
    if o.clip:
        top = 1.0 if wide else 2.0
        upper = Parameter(torch.ones_like(start.scale, requires_grad=True), slow, _LEAST, top)
        if not start.units.form.symmetric:
            lower = Parameter(torch.ones_like(start.scale, requires_grad=True), slow, _LEAST, top)
    return Rounder(start, offset, origin, upper, lower)


def fit(block: FitBlock, io: FitIO, targets: Mapping[str, Target], o: Options) -> BlockFit:
    """All covered layers of a block, quantized together. Raises PlanError without bits in a target."""
    schedule = Schedule(o.iters, 1.0, o.rule)
    return blockfit.descend(block, io, targets, o, lambda start: begin(start, o), schedule)


METHOD = Fit(
    paper="Cheng et al. 2024, arXiv 2309.05516",
    options=Options,
    needs=("square",),
    formats=("int", *KINDS),
    baseline="rtn",
    covers={
        "signround": [{"method": "signround", "target": {"bits": 4}, "options": {"start": "minmax", "weigh": "alike"}}],
    },
    run=fit,
    copies=10,  # the weight, its start, V and its gradient, What and its gradient, two states to return to, Adam's two
    looks=looks,
)
