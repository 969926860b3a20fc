"""Least squares: the linears that read what has left are fitted anew on what stays, and the block on the whole stream.

First, where inputs P of a linear have left and K stay, with the Gram matrix G of its inputs in the unedited block:

    W' = W_K + W_P G_PK (G_KK + lambda I)^-1,

the least output error |X WT - X_K W'T|^2 with a ridge on the change. Then, with `stream`, the linear that ends the
block: with X its inputs in the edited block and E what the block's outputs lack of the unedited model's hidden states
after it (and after all blocks that left behind it), W' = W + ET X (XT X + lambda I)^-1. Tokens weigh by the inverse
mean square of what they should become, because a norm follows. lambda is a share of the mean of the diagonal, of those
in `ridges` the one whose fit to either half of the samples has the least error on the other; where none is better than
no change there is none.

Paper: bias and least-squares compensation as in An et al. 2024, arXiv 2312.11983, and Frantar & Alistarh 2022,
arXiv 2208.11580; the second half, and the choice of the ridge, are ours.
Cost: two forward passes of a block, and in^3 for each linear and ridge. Limits: describes the calibration text; experts
are fitted by the first half alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from lilliput.target import Strict
from lilliput.verbs.repair import Consumer, Repair, RepairIO
from lilliput.verbs.view import FitBlock


class Options(Strict):
    """See the module's docstring."""

    ridges: tuple[float, ...] = Field(
        (0.003, 0.02, 0.1, 0.5), min_length=1, description="ridges to choose from, as shares of the mean diagonal"
    )
    stream: bool = Field(True, description="fit the end of the block to the unedited model's hidden states")


@dataclass(frozen=True)
class Normal:
    """Normal equations of a change D [out, in] that is to make up for an error E: gram XT X [in, in] and cross ET X
    [out, in], float64, so that |E - X DT|^2 is tr(D gram DT) - 2 tr(D crossT) and a constant."""

    gram: Tensor
    cross: Tensor

    def change(self, ridge: float) -> Tensor:
        """cross (gram + ridge * mean(diagonal) * I)^-1; 0 where nothing was seen."""
        mean = float(self.gram.diagonal().mean()) if len(self.gram) else 0.0
        if mean <= 0.0:
            return torch.zeros_like(self.cross)
        eye = torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        factor, info = torch.linalg.cholesky_ex(self.gram + max(ridge, 1e-8) * mean * eye)
        while int(info):
            ridge = max(10.0 * ridge, 1e-6)
            factor, info = torch.linalg.cholesky_ex(self.gram + ridge * mean * eye)
        return torch.cholesky_solve(self.cross.T, factor).T

    def error(self, change: Tensor) -> float:
        """What a change makes of the error, less what it is without one."""
        return float((change @ self.gram * change).sum() - 2.0 * (change * self.cross).sum())

    def plus(self, other: Normal) -> Normal:
        return Normal(self.gram + other.gram, self.cross + other.cross)


def repair(block: FitBlock, io: RepairIO, o: Options) -> Mapping[str, Tensor]:
    """New weights of the linears that are fitted."""
    out = {name: refitted(x, o.ridges) for name, x in io.consumers().items()}
    ends = [x.name for x in block.anatomy.linears if x.role == "down" and x.expert is None]
    if o.stream and len(ends) == 1:
        weight = out.get(ends[0], block.layers[ends[0]].weight)
        out[ends[0]] = caught_up(io, ends[0], out, weight, o.ridges)
    return out


def fitted(halves: tuple[Normal, Normal], ridges: Sequence[float]) -> Tensor:
    """The change by the ridge that does best on the half that it was not fitted to; none where that is not below 0."""
    one, two = halves
    errors = [(two.error(one.change(x)) + one.error(two.change(x)), x) for x in ridges]
    least, ridge = min(errors)
    both = one.plus(two)
    return both.change(ridge) if least < 0.0 else torch.zeros_like(both.cross)


def refitted(x: Consumer, ridges: Sequence[float]) -> Tensor:
    """The weight on the inputs that stay, float32 [out, kept]."""
    gone = torch.ones(x.weight.shape[1], dtype=torch.bool, device=x.weight.device)
    gone[x.kept] = False
    lost = x.weight[:, gone].double()
    one, two = (Normal(g[x.kept][:, x.kept].double(), lost @ g[gone][:, x.kept].double()) for g in x.halves)
    return (x.weight[:, x.kept].double() + fitted((one, two), ridges)).float()


def caught_up(
    io: RepairIO, name: str, weights: Mapping[str, Tensor], weight: Tensor, ridges: Sequence[float]
) -> Tensor:
    """The weight of the linear that ends a block, with which its outputs come nearest to the targets."""
    rows, width = weight.shape
    halves = [
        Normal(*(torch.zeros(n, width, dtype=torch.float64, device=weight.device) for n in (width, rows)))
        for _ in range(2)
    ]
    for half, entered, gives, wanted in io.passes(name, weights):
        x, error, size = entered.flatten(0, 1), (wanted - gives).flatten(0, 1), wanted.flatten(0, 1)
        scale = size.square().mean(1, keepdim=True).clamp_(min=1e-12).rsqrt_()
        x, error = x * scale, error * scale
        halves[half].gram.add_(x.T @ x)
        halves[half].cross.add_(error.T @ x)
    return (weight.double() + fitted((halves[0], halves[1]), ridges)).float()


METHOD = Repair(
    paper="An et al. 2024, arXiv 2312.11983; Frantar & Alistarh 2022, arXiv 2208.11580",
    options=Options,
    needs=(),
    covers={},
    recipe=[{"method": "flap"}, {"method": "refit"}],
    run=repair,
    copies=4,
    looks=lambda options, samples: samples if options.stream else 0,
)
