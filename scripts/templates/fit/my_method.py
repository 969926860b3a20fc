"""replace: one line that says what my-method does. Now: train the scales of codes that stay.

replace: the equations. Unit u of weights that share a scale S: What = c S f with codes c as they come and a factor f
for each unit; the mean squared error of the block's outputs goes down by Adam.

Paper: replace: authors, year, arXiv number.
Cost: iters times a forward and backward pass of `batch` samples through the block. Limits: no code changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.formats import rounding
from lilliput.target import Target
from lilliput.training import block as blockfit
from lilliput.training.block import FitOptions, Start
from lilliput.training.descent import looks
from lilliput.training.minimise import Parameter, Schedule
from lilliput.verbs.fit import Fit
from lilliput.verbs.view import BlockFit, FitBlock, FitIO


class Options(FitOptions):
    """replace: your options, each with a default and a description. `lr` defaults to 0.4 / iters."""


@dataclass(frozen=True)
class Rounder:
    """Rows of a linear: what is trained of them, and the weight that it stands for."""

    start: Start
    factor: Parameter  # float32 [units]

    @property
    def parameters(self) -> Sequence[Parameter]:
        return [self.factor]

    def scale(self) -> Tensor:
        """As stored, float32 [units]; differentiable."""
        start = self.start
        return rounding.stored(start.scale * self.factor.value, start.zero, start.units, start.grid)[0]

    def centred(self) -> Tensor:
        """Codes less their zero points, float32 [rows, in]."""
        return self.start.codes - self.start.units.spread(self.start.zero)

    def weight(self) -> Tensor:
        # replace: the weight for the present numbers
        return self.start.masked(self.centred() * self.start.units.spread(self.scale()))

    def finish(self) -> tuple[Tensor, Any]:
        # replace: codes and grid of that weight
        with torch.no_grad():
            start = self.start
            return rounding.encode(self.centred(), self.scale(), start.zero, start.units, start.grid)


def begin(start: Start) -> Rounder:
    """Rows of a linear at their start."""
    return Rounder(start, Parameter(torch.ones_like(start.scale, requires_grad=True), low=0.05))


def fit(block: FitBlock, io: FitIO, targets: Mapping[str, Target], o: Options) -> BlockFit:
    """All covered layers of a block, quantized together. Raises PlanError without bits in a target."""
    rate = o.lr if o.lr is not None else 0.4 / max(o.iters, 1)
    return blockfit.descend(block, io, targets, o, begin, Schedule(o.iters, rate, "adam"))


METHOD = Fit(
    paper="replace: authors, year, arXiv number",
    options=Options,
    needs=("square",),  # replace: the statistics you read, of lilliput.stats.fold.NAMES
    formats=("int",),
    baseline=None,  # replace: the method that yours must beat on correlated inputs
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    run=fit,
    copies=8,  # replace: float32 copies of a block's weights that you hold at once
    looks=looks,
)
