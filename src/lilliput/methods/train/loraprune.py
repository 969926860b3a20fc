"""LoRAPrune: what leaves is decided by gradients of adapters; the weights themselves have none.

The weight is M * (W + B A), W as it was and A [r, in], B [out, r] trained. From the gradients of the two factors the
gradient by the weight is estimated as what a step along them would take from their product, and scores are smoothed
over steps:

    G = dB A + B dA - dB dA,   S <- gamma S + (1 - gamma) ((W + B A) * G)^2.

Zeros become more as s(u) says; at the end the adapters are part of the weights.

Paper: Zhang et al. 2024, arXiv 2305.18403 (weights and patterns N:M; groups of rows and columns leave by edits). Cost:
two factors with their gradients and moments, the scores, and the weight. Limits: scores see W only through what the
adapters can express.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from lilliput.parts.layer import Layer
from lilliput.training.sparse import Sparse, SparseOptions, admits, first, restarts
from lilliput.verbs.train import Train
from lilliput.verbs.trained import Trained

_ROWS = 1 << 20  # estimated gradients in memory at a time


class Options(SparseOptions):
    """See the module's docstring."""

    width: int = Field(8, ge=1, description="r, channels between the factors")
    smoothing: float = Field(0.9, ge=0.0, lt=1.0, description="gamma, of scores over steps")


class Adapted(Sparse):
    """A weight that stays, two factors beside it, and scores."""

    settings: Options
    frozen: Tensor
    score: Tensor

    def __init__(self, layer: Layer, original: Tensor, o: Options) -> None:
        super().__init__(layer, original, o)
        rows, width = self.mask.shape
        self.register_buffer("frozen", first(layer, original, o))
        self.register_buffer("score", torch.zeros(rows, width))
        generator = torch.Generator().manual_seed(o.seed)
        self.down = nn.Parameter(torch.randn(o.width, width, generator=generator) / width**0.5)
        self.up = nn.Parameter(torch.zeros(rows, o.width))

    def state(self) -> Mapping[str, Tensor]:
        return {"mask": self.mask, "score": self.score}

    def scores(self) -> Tensor:
        return self.score

    def values(self) -> Tensor:
        return self.frozen + self.up @ self.down

    @torch.no_grad()
    def after_backward(self) -> None:
        up, down = self.up.grad, self.down.grad
        if up is None or down is None:
            return
        step = max(1, _ROWS // self.mask.shape[1])
        for a in range(0, len(self.mask), step):
            rows = slice(a, a + step)
            slope = up[rows] @ (self.down - down) + self.up[rows] @ down
            seen = (slope * (self.frozen[rows] + self.up[rows] @ self.down)).square()
            self.score[rows].lerp_(seen, 1 - self.settings.smoothing)


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The original's weights, with adapters that add nothing."""
    return Adapted(layer, original, o)


_PRUNED = {"method": "magnitude", "target": {"sparsity": 0.5}}

METHOD = Train(
    paper="Zhang et al. 2024, arXiv 2305.18403",
    options=Options,
    covers={"loraprune": [_PRUNED, {"method": "loraprune"}]},
    recipe=[_PRUNED, {"method": "loraprune"}],
    begin=begin,
    admits=admits,
    copies=5,
    moves=True,
    restarts=restarts,
)
