"""OmniQuant: the range of every group of weights is clipped by learned factors, on the output of the block.

S = (sigma(g) max w - sigma(b) min w) / (2^bits - 1) and Z = lowest - round(sigma(b) min w / S) for every unit of
weights that share a scale, What = S (clip(round(w / S) + Z) - Z), g and b trained by Adam against what the uncompressed
block gives for the same inputs, gradients straight through every rounding; symmetric grids have one factor on S. This
is the paper's learnable weight clipping. Where a step before it rounds inputs, the descent sees them rounded.

Factors count from the start's range, sigma(g) / sigma(4), so that no steps leave the start as it is: with start=minmax
that is plain rounding to nearest, where the paper begins at 0.98 of it. After a step that quantizes, its codes stay, as
under signround, and their scales move.

`let` learns the paper's other half with it, equivalent transformations. Channel j of what a linear reads becomes
(x_j - d_j) / s_j, the reader's weight and bias s_j W and b + W d, folded into the norm in front (`norm`) or also into
the linear in front (`all`: values, hidden channels of an MLP):

    min over g, b, s, d of |F(W, X) - F'(Q(s W), Q_in((X - d) / s))|^2,    S and Z from the range of the scaled weight.

s = exp(t) starts at 1 and d at 0, so that no steps change nothing; the paper starts at SmoothQuant's s, which is the
step `smoothquant` in front (`os-plus`: with shifts). d needs a norm and readers with biases. The factor that the paper
moves between queries and keys, which nothing here rounds, is left out.

Paper: Shao et al. 2023, arXiv 2308.13137.
Cost: iters times a forward and backward pass of `batch` samples through the block. Limits: integer formats; the paper
takes 2,560 steps of 1e-2 for clipping and 5e-3 for s and d, and the default for fewer steps is longer ones. `let` needs
weights that no earlier step has rounded; a static scale of inputs stays the one that was found before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.formats import rounding
from lilliput.target import Target
from lilliput.training import block as blockfit
from lilliput.training import equivalence
from lilliput.training.block import FitOptions, Start
from lilliput.training.descent import looks
from lilliput.training.minimise import Parameter, Schedule
from lilliput.verbs.fit import Fit
from lilliput.verbs.view import BlockFit, FitBlock, FitIO

_BEGIN = 4.0  # of g and b
_TRAVEL = 8.0  # all steps together, at most twice as far as they get
_LOGS = 3.0  # of the logarithms of scales, likewise


class Options(FitOptions):
    """`lr` defaults to 8 / iters, in units of g and b; `let_lr` to 3 / iters."""

    margin: float = Field(0.5, ge=0.0, le=1.0, description="where a code of an earlier step starts, as for signround")
    let: Literal["none", "norm", "all"] = Field(
        "none", description="learn scales and shifts of channels: behind norms, or wherever they fold away"
    )
    let_lr: float | None = Field(None, gt=0.0, description="first step of log s, and of d in a channel's rms")


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
        weight, up, down = self.start.present()
        lower = None if self.lower is None else _factor(self.lower) * down
        scale, zero = self.start.clipped(_factor(self.upper) * up, lower)
        if self.origin is not None:
            return self.origin, scale, zero
        return weight * self.start.units.spread(scale.reciprocal()), scale, zero

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
    """All covered layers of a block, quantized together. Raises PlanError without bits in a target, and where
    scales are to be learned but no linear comes with plain weights."""
    steps = max(o.iters, 1)
    rate = o.lr if o.lr is not None else _TRAVEL / steps
    moves = None
    if o.let != "none":
        own = o.let_lr if o.let_lr is not None else _LOGS / steps
        moves = equivalence.begin(block, io.stats, o.let == "norm", own / rate)
    schedule = Schedule(o.iters, rate, "adam")
    return blockfit.descend(block, io, targets, o, lambda start: begin(start, o), schedule, moves=moves)


METHOD = Fit(
    paper="Shao et al. 2023, arXiv 2308.13137",
    options=Options,
    needs=("square",),
    formats=("int",),
    moving=lambda o: o.let != "none",
    baseline="rtn",
    covers={
        "omniquant": [
            {"method": "smoothquant"},
            {"method": "act-static-dynamic", "target": {"bits": 4}},
            {
                "method": "omniquant",
                "target": {"bits": 4, "group_size": "channel", "symmetric": False},
                "options": {"start": "minmax", "weigh": "alike", "let": "all"},
            },
        ],
    },
    run=fit,
    copies=8,  # the weight as it was and scaled, its start, its position, What and its gradients
    looks=looks,
)
