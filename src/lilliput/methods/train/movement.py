"""Movement pruning: weights stay that training moves away from 0, whatever their size.

The scores S of a linear collect -w dL/dw while the weights, or (`frozen`) the scores alone, are trained: with
What = M * W, and the mask M a straight-through function of S, the gradient by S is dL/dWhat * W, and the optimizer goes
down it at `score_rate` times the learning rate. With `block` [r, c] the weights of r rows and c inputs stay or leave
together, by their mean score, and `magnitude` with the same blocks comes first. kind:

    hard   the weights of the highest scores stay, their share falling as s(u) says;
    soft   those with sigmoid(S) > tau, and penalty u lambda mean sigmoid(S), until the schedule ends: from then on the
           highest scores, as many as planned;
    pst    hard, with S = |W| + A B + r 1' + 1 c' (A of `products` columns, 0 at first, r and c by row and by column),
           so that the scores of a linear are few.

Papers: Sanh et al. 2020, arXiv 2005.07683; scores alone: SMP, Jiang et al. 2022, arXiv 2210.07451; PST: Li et al. 2022,
arXiv 2205.11005; blocks: Lagunas et al. 2021, arXiv 2109.04838. Cost: a second parameter for each weight, with its
gradient and moments (not for pst). Limits: many steps are needed before scores say more than magnitudes do.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lilliput.parts.layer import Layer
from lilliput.training.sparse import Latent, SparseOptions, admits, restarts
from lilliput.verbs.train import Train
from lilliput.verbs.trained import Trained


class Options(SparseOptions):
    """See the module's docstring."""

    kind: Literal["hard", "soft", "pst"] = Field("hard", description="how scores become a mask")
    frozen: bool = Field(False, description="weights stay as they are: which of them, is all that is trained (SMP)")
    score_rate: float = Field(100.0, gt=0.0, description="factor on the learning rate, of scores")
    tau: float = Field(0.1, gt=0.0, lt=1.0, description="soft: threshold of sigmoid(S)")
    strength: float = Field(1.0, ge=0.0, description="soft: lambda of the penalty")
    block: tuple[int, int] = Field((1, 1), description="rows and inputs of blocks that stay or leave together")
    products: int = Field(8, ge=1, description="pst: columns of A")


class Chosen(torch.autograd.Function):
    """W * M; the gradient by M is that of the scores, which take no part in the value."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(value, mask)
        return value * mask

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        value, mask = ctx.saved_tensors  # type: ignore[attr-defined]
        return slopes[0] * mask, slopes[0] * value, None


class Moving(Latent):
    """Weights and their scores."""

    settings: Options

    def __init__(self, layer: Layer, original: Tensor, o: Options) -> None:
        super().__init__(layer, original, o)
        rows, width = self.mask.shape
        self.value.requires_grad_(not o.frozen)
        self._time = 0.0
        self.block = o.block
        if o.kind == "pst":
            generator = torch.Generator().manual_seed(o.seed)
            self.left = nn.Parameter(torch.zeros(rows, o.products))
            self.right = nn.Parameter(torch.randn(o.products, width, generator=generator) / o.products**0.5)
            self.by_row = nn.Parameter(torch.zeros(rows, 1))
            self.by_column = nn.Parameter(torch.zeros(1, width))
        else:
            self.score = nn.Parameter(torch.zeros(rows, width))

    def rates(self) -> dict[str, float]:
        names = ("left", "right", "by_row", "by_column") if self.settings.kind == "pst" else ("score",)
        return dict.fromkeys(names, self.settings.score_rate)

    def scores(self) -> Tensor:
        if self.settings.kind != "pst":
            return self.score
        return self.value.detach().abs() + self.left @ self.right + self.by_row + self.by_column

    def step(self, done: float) -> None:
        self._time = self.at(done)
        super().step(done)

    def chosen(self, u: float) -> Tensor:
        if self.settings.kind == "soft" and u < 1.0:
            return self.score.detach().sigmoid() > self.settings.tau
        return super().chosen(u)

    def weight(self) -> Tensor:
        weight: Tensor = Chosen.apply(self.value, self.scores(), self.mask)  # type: ignore[no-untyped-call]
        return weight

    def penalty(self) -> Tensor | None:
        if self.settings.kind != "soft" or self._time >= 1.0:
            return None
        return self.settings.strength * self._time * self.score.sigmoid().mean()


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The original's weights, with scores of 0."""
    return Moving(layer, original, o)


_PRUNED = {"method": "magnitude", "target": {"sparsity": 0.5}}

METHOD = Train(
    paper="Sanh et al. 2020, arXiv 2005.07683",
    options=Options,
    covers={
        "movement": [_PRUNED, {"method": "movement"}],
        "smp": [_PRUNED, {"method": "movement", "options": {"frozen": True}}],
        "block-movement": [
            {"method": "magnitude", "target": {"sparsity": 0.5}, "options": {"block": [16, 16]}},
            {"method": "movement", "options": {"block": [16, 16]}},
        ],
        "pst": [_PRUNED, {"method": "movement", "options": {"kind": "pst"}}],
    },
    recipe=[_PRUNED, {"method": "movement"}],
    begin=begin,
    admits=admits,
    copies=9,
    moves=True,
    restarts=restarts,
)
