"""OmniQuant: the range of every group of weights is clipped by learned factors, on the output of the block.

S = (sigma(g) max w - sigma(b) min w) / (2^bits - 1) and Z = lowest - round(sigma(b) min w / S) for every unit of
weights that share a scale, What = S (clip(round(w / S) + Z) - Z), g and b trained by Adam against what the uncompressed
block gives for the same inputs, gradients straight through every rounding; symmetric grids have one factor on S. This
is the paper's learnable weight clipping. Where a step before it rounds inputs, the descent sees them rounded.

Factors count from the start's range, sigma(g) / sigma(4), so that no steps leave the start as it is: with start=minmax
that is plain rounding to nearest, where the paper begins at 0.98 of it. After a step that quantizes, its codes stay, as
under signround, and their scales move.

The paper's other half, learned shifts and scales of channels that are folded into norms (LET), is not learned here:
`smoothquant` in front gives the scales that it starts from, `os-plus` shifts as well.

Paper: Shao et al. 2023, arXiv 2308.13137.
Cost: iters times a forward and backward pass of `batch` samples through the block. Limits: integer formats; the paper
takes 2,560 steps of 1e-2, and the default for fewer steps is longer ones.
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

_BEGIN = 4.0  # of g and b
_TRAVEL = 8.0  # all steps together, at most twice as far as they get


class Options(FitOptions):
    """`lr` defaults to 8 / iters, in units of g and b."""

    margin: float = Field(0.5, ge=0.0, le=1.0, description="where a code of an earlier step starts, as for signround")


@dataclass(frozen=True)
class Clipper:
    """Rows of a linear: g and b of every unit."""

    start: Start
    origin: Tensor | None  # position of the codes (None: w / S)
    upper: Parameter  # g, float32 [units]
    lower: Parameter | None  # b; None for symmetric grids

    @property
    def parameters(self) -> Sequence[Parameter]:
        return [self.upper] if self.lower is None else [self.upper, self.lower]

    def _placed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, scale and zero point."""
        scale, zero = self.start.clipped(_factor(self.upper), None if self.lower is None else _factor(self.lower))
        if self.origin is not None:
            return self.origin, scale, zero
        return self.start.weight * self.start.units.spread(scale.reciprocal()), scale, zero

    def weight(self) -> Tensor:
        position, scale, zero = self._placed()
        return self.start.masked(rounding.rounded(position, scale, zero, self.start.units))

    def finish(self) -> tuple[Tensor, Any]:
        with torch.no_grad():
            position, scale, zero = self._placed()
            return rounding.encode(position, scale, zero, self.start.units, self.start.grid)


def _factor(logit: Parameter) -> Tensor:
    return torch.sigmoid(logit.value) / torch.sigmoid(torch.tensor(_BEGIN))


def begin(start: Start, o: Options) -> Clipper:
    """Rows of a linear at their start."""

    def logits() -> Parameter:
        return Parameter(torch.full_like(start.scale, _BEGIN, requires_grad=True), low=-_BEGIN)

    origin = start.origin(o.margin) if start.continued else None
    return Clipper(start, origin, logits(), None if start.units.form.symmetric else logits())


def fit(block: FitBlock, io: FitIO, targets: Mapping[str, Target], o: Options) -> BlockFit:
    """All covered layers of a block, quantized together. Raises PlanError without bits in a target."""
    rate = o.lr if o.lr is not None else _TRAVEL / max(o.iters, 1)
    return blockfit.descend(block, io, targets, o, lambda start: begin(start, o), Schedule(o.iters, rate, "adam"))


METHOD = Fit(
    paper="Shao et al. 2023, arXiv 2308.13137",
    options=Options,
    needs=("square",),
    formats=("int",),
    baseline="rtn",
    covers={
        "omniquant": [
            {"method": "smoothquant"},
            {"method": "act-static-dynamic", "target": {"bits": 4}},
            {
                "method": "omniquant",
                "target": {"bits": 4, "group_size": "channel", "symmetric": False},
                "options": {"start": "minmax", "weigh": "alike"},
            },
        ],
    },
    run=fit,
    copies=7,  # the weight, its start, its position, What and its gradients
    looks=looks,
)
