"""AdaRound: every weight of a block goes up or down, decided by a sigmoid that is driven to 0 or 1.

On the start's grid: What = S clip(floor(w / S) + h(V)), h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1); at first h is the
fractional part of w / S. Adam lowers the block's mean squared output error plus weight * mean(1 - |2 h - 1|^beta),
where beta falls from 20 to 2 after a first fifth without that term; at the end h becomes 0 or 1. The error counts as a
share of what the start loses and the penalty as a mean, so that `weight` means the same in every block. After a step
that quantizes, floor and fraction are those of the nearest position that rounds to its code.

Paper: Nagel et al. 2020, arXiv 2004.10568 (layer by layer; here all layers of a block at once, as BRECQ does,
arXiv 2102.05426).
Cost: iters times a forward and backward pass of `batch` samples. Limits: integer formats, scales stay; the paper takes
10,000 steps, and with few of them the penalty rounds before the error is known.
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
from lilliput.training.block import FitOptions, Fitted, Start
from lilliput.training.descent import looks
from lilliput.training.minimise import Parameter, Schedule
from lilliput.verbs.fit import Fit
from lilliput.verbs.view import BlockFit, FitBlock, FitIO

_WARM = 0.2


class Options(FitOptions):
    """`lr` defaults to 4 / iters: V starts within 2.5 of 0, where h is a half."""

    weight: float = Field(1.0, ge=0.0, description="weight of the term that drives h to 0 or 1")
    beta_start: float = Field(20.0, ge=1.0, description="its first exponent")
    beta_end: float = Field(2.0, ge=1.0, description="its last exponent")


@dataclass(frozen=True)
class Rounder:
    """Rows of a linear: floor float32 [out, in] in centred codes, and V."""

    start: Start
    floor: Tensor
    choice: Parameter

    @property
    def parameters(self) -> Sequence[Parameter]:
        return [self.choice]

    def share(self) -> Tensor:
        """h(V)."""
        return (1.2 * torch.sigmoid(self.choice.value) - 0.1).clamp(0.0, 1.0)

    def _window(self) -> tuple[Tensor, Tensor]:
        units = self.start.units
        low = units.spread(units.form.lowest - self.start.zero)
        return low, low + (units.form.highest - units.form.lowest)

    def weight(self) -> Tensor:
        low, high = self._window()
        code = torch.minimum(torch.maximum(self.floor + self.share(), low), high)
        return self.start.masked(code * self.start.units.spread(self.start.scale))

    def finish(self) -> tuple[Tensor, Any]:
        with torch.no_grad():
            position = self.floor + (self.choice.value >= 0)
            return rounding.encode(position, self.start.scale, self.start.zero, self.start.units, self.start.grid)


def begin(start: Start) -> Rounder:
    """Rows of a linear whose h is the fractional part, so that they round to the start's codes."""
    position = start.origin(0.0)
    floor = position.floor()
    share = position.sub_(floor).add_(0.1).div_(1.2)
    return Rounder(start, floor, Parameter(torch.logit(share).requires_grad_()))


def fit(block: FitBlock, io: FitIO, targets: Mapping[str, Target], o: Options) -> BlockFit:
    """All covered layers of a block, rounded together. Raises PlanError without bits in a target."""
    count = sum(x.weight.numel() for x in block.layers.values())

    def penalty(x: Fitted, progress: float) -> Tensor | None:
        if progress < _WARM or o.weight == 0 or not isinstance(x, Rounder):
            return None
        beta = o.beta_start + (o.beta_end - o.beta_start) * (progress - _WARM) / (1 - _WARM)
        undecided = 1 - (2 * x.share() - 1).abs().pow(beta)
        return undecided.sum() * (o.weight / count)

    rate = o.lr if o.lr is not None else 4.0 / max(o.iters, 1)
    return blockfit.descend(block, io, targets, o, begin, Schedule(o.iters, rate, "adam"), penalty)


METHOD = Fit(
    paper="Nagel et al. 2020, arXiv 2004.10568",
    options=Options,
    needs=("square",),
    formats=("int",),
    baseline="rtn",
    covers={
        "adaround": [{"method": "adaround", "target": {"bits": 4}}],
    },
    run=fit,
    copies=12,  # those of signround, and the sigmoid's own
    looks=looks,
)
