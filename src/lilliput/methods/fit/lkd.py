"""LKD: layer-by-layer distillation, in which the weights of one block after another are trained under rounding.

For block k with inputs X_k, in order, and everything else frozen:

    min over W of  mean squared difference of L_k(X_k) and Lhat_k(X_k),    What = S (clip(round(w / S) + Z) - Z),

by Adam on latent weights in units of their steps, gradients straight through the rounding; the best state is kept. Only
one block has gradients and moments at a time, whatever the depth. After a step that quantizes it goes on from that
step's codes, as signround does.

Inputs are those that the compressed blocks before give. (ZeroQuant's own are of the uncompressed model, whose blocks
then never see what earlier ones have lost.) Steps of grids stay.

Paper: Yao et al. 2022 (ZeroQuant), arXiv 2206.01861. Cost: iters times a forward and backward pass of `batch` samples.
Limits: integers and ggml's types; it fits the calibration text, so few samples and many steps read too much into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


class Options(FitOptions):
    """`lr` is in steps of the grid and defaults to 1 / iters: a latent weight then moves by half a step at most."""

    margin: float = Field(0.5, ge=0.0, le=1.0, description="where a code of an earlier step starts, as for signround")


@dataclass(frozen=True)
class Rounder:
    """Rows of a linear: what has been added to the position of each weight."""

    start: Start
    origin: Tensor  # w / S, float32 [rows, in]
    moved: Parameter

    @property
    def parameters(self) -> Sequence[Parameter]:
        return [self.moved]

    def weight(self) -> Tensor:
        start = self.start
        value = rounding.rounded(self.origin + self.moved.value, start.scale, start.zero, start.units)
        return start.masked(value)

    def finish(self) -> tuple[Tensor, Any]:
        start = self.start
        with torch.no_grad():
            return rounding.encode(self.origin + self.moved.value, start.scale, start.zero, start.units, start.grid)


def begin(start: Start, o: Options) -> Rounder:
    """Rows of a linear at their start."""
    uneven = start.units.form.levels(start.weight.device) is not None
    if start.continued or uneven:
        origin = start.origin(o.margin)
    else:
        origin = start.weight * start.units.spread(start.scale.reciprocal())
    return Rounder(start, origin, Parameter(torch.zeros_like(start.weight, requires_grad=True)))


def fit(block: FitBlock, io: FitIO, targets: Mapping[str, Target], o: Options) -> BlockFit:
    """All covered layers of a block, quantized together. Raises PlanError without bits in a target."""
    rate = o.lr if o.lr is not None else 1.0 / max(o.iters, 1)
    return blockfit.descend(block, io, targets, o, lambda start: begin(start, o), Schedule(o.iters, rate, "adam"))


METHOD = Fit(
    paper="Yao et al. 2022 (ZeroQuant), arXiv 2206.01861",
    options=Options,
    needs=("square",),
    formats=("int", *KINDS),
    baseline="rtn",
    covers={
        "lkd": [{"method": "lkd", "target": {"bits": 4}, "options": {"start": "minmax", "weigh": "alike"}}],
    },
    run=fit,
    copies=9,  # the weight, its start, what moves, What, a gradient of each, a state to return to, and two moments
    looks=looks,
)
