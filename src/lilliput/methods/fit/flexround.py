"""FlexRound: each weight is divided by a factor of its own before it is rounded, trained on the output of the block.

What = S round(w / (S S2 s3)) with a factor S2 [out, in] for every weight, s3 [out, 1] for every output, and the scale S
of each unit itself; all start so that the start's codes come out, stay positive, and go down the mean squared error of
the block's outputs by Adam, gradients straight through the rounding. Large weights move by more codes than small ones.
After a step that quantizes, w / S is the position described under signround, and stays when S moves.

Paper: Lee et al. 2023, arXiv 2306.00317.
Cost: iters times a forward and backward pass of `batch` samples. Limits: integer formats; a weight at code 0 can hardly
leave it; the paper takes 5,000 steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lilliput.formats import rounding
from lilliput.target import Target
from lilliput.training import block as blockfit
from lilliput.training.block import FitOptions, Start
from lilliput.training.descent import looks
from lilliput.training.minimise import Parameter, Schedule
from lilliput.verbs.fit import Fit
from lilliput.verbs.view import BlockFit, FitBlock, FitIO

_LEAST = 0.05


class Options(FitOptions):
    """`lr` defaults to 0.4 / iters: factors change by up to a fifth."""

    margin: float = Field(0.5, ge=0.0, le=1.0, description="where a code of an earlier step starts, as for signround")


@dataclass(frozen=True)
class Rounder:
    """Rows of a linear: factors of every weight, of every output, and of every unit's scale."""

    start: Start
    origin: Tensor | None  # position that is divided (None: w / S)
    each: Parameter  # S2
    row: Parameter  # s3
    step: Parameter  # S by the start's

    @property
    def parameters(self) -> Sequence[Parameter]:
        return [self.each, self.row, self.step]

    def _scale(self) -> Tensor:
        start = self.start
        return rounding.stored(start.scale * self.step.value, start.zero, start.units, start.grid)[0]

    def _position(self, scale: Tensor) -> Tensor:
        whole = self.origin
        if whole is None:
            whole = self.start.weight * self.start.units.spread(scale.reciprocal())
        return whole / (self.each.value * self.row.value)

    def weight(self) -> Tensor:
        scale = self._scale()
        return self.start.masked(rounding.rounded(self._position(scale), scale, self.start.zero, self.start.units))

    def finish(self) -> tuple[Tensor, Any]:
        with torch.no_grad():
            scale = self._scale()
            return rounding.encode(self._position(scale), scale, self.start.zero, self.start.units, self.start.grid)


def begin(start: Start, o: Options) -> Rounder:
    """Rows of a linear at their start."""
    leaf = torch.ones_like(start.weight, requires_grad=True)
    row = torch.ones(start.units.rows, 1, device=leaf.device, requires_grad=True)
    step = torch.ones_like(start.scale, requires_grad=True)
    origin = start.origin(o.margin) if start.continued else None
    return Rounder(start, origin, Parameter(leaf, low=_LEAST), Parameter(row, low=_LEAST), Parameter(step, low=_LEAST))


def fit(block: FitBlock, io: FitIO, targets: Mapping[str, Target], o: Options) -> BlockFit:
    """All covered layers of a block, quantized together. Raises PlanError without bits in a target."""
    rate = o.lr if o.lr is not None else 0.4 / max(o.iters, 1)
    return blockfit.descend(block, io, targets, o, lambda start: begin(start, o), Schedule(o.iters, rate, "adam"))


METHOD = Fit(
    paper="Lee et al. 2023, arXiv 2306.00317",
    options=Options,
    needs=("square",),
    formats=("int",),
    baseline="rtn",
    covers={
        "flexround": [{"method": "flexround", "target": {"bits": 4}}],
    },
    run=fit,
    copies=11,  # those of signround, and the position
    looks=looks,
)
