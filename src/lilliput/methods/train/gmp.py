"""Gradual magnitude pruning: the smallest weights leave a few at a time, while the others are trained.

With S = |W| the share of zeros rises as s(u) = s + (s_0 - s) (1 - u)^3 (`sparse_from`, `begin`, `until`, `every`). A
weight that has left takes no part in the forward pass; by default it gets no gradient either and keeps its value, so
that it comes back only where others fall below it. With `through` gradients reach it as if it had stayed, and
`regrow` g + lambda (1 - M) * W is what is stepped along: SR-STE, with zeros at the planned number from the start
(`sparse_from: 1`) and for N:M above all. `penalty` adds to the loss, or after each step, for every linear

    l1: lambda sum |w|,   l2: lambda sum w^2,   rpp: w <- sign(w) max(0, |w| - rate lambda / (|w| + eps)),

the last a proximal step of the reweighted L1, apart from the gradients of the task.

Papers: Zhu & Gupta 2017, arXiv 1710.01878; SR-STE: Zhou et al. 2021, arXiv 2102.04010; RPP: Guo et al. 2019, arXiv
1909.12486. Cost: a weight, its gradient and two moments in float32. Limits: the planned number of zeros is that of each
linear; zeros do not move from one to the other.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.parts.layer import Layer
from lilliput.training.sparse import Latent, SparseOptions, admits, restarts, straight
from lilliput.verbs.train import Train
from lilliput.verbs.trained import Trained


class Options(SparseOptions):
    """See the module's docstring."""

    through: bool = Field(False, description="gradients reach weights that have left (straight through)")
    regrow: float = Field(0.0, ge=0.0, description="with through: lambda of what draws such weights to 0")
    penalty: Literal["none", "l1", "l2", "rpp"] = Field("none", description="what draws all weights to 0")
    strength: float = Field(1e-4, ge=0.0, description="lambda of the penalty")
    eps: float = Field(1e-3, gt=0.0, description="rpp: below this size a weight falls as fast as it can")


class Gradual(Latent):
    """Magnitudes decide."""

    settings: Options

    def scores(self) -> Tensor:
        return self.value.abs()

    def weight(self) -> Tensor:
        return straight(self.value, self.mask) if self.settings.through else self.value * self.mask

    def penalty(self) -> Tensor | None:
        o = self.settings
        if o.penalty == "l1":
            return o.strength * self.value.abs().sum()
        return o.strength * self.value.square().sum() if o.penalty == "l2" else None

    def after_backward(self) -> None:
        if self.settings.regrow and self.value.grad is not None:
            self.value.grad.add_(self.value.detach() * ~self.mask, alpha=self.settings.regrow)

    def after_step(self, rate: float) -> None:
        o = self.settings
        if o.penalty == "rpp":
            with torch.no_grad():
                size = self.value.abs()
                left = (size - rate * o.strength / (size + o.eps)).clamp_(min=0.0)
                self.value.copy_(self.value.sign() * left)


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The original's weights, all of them."""
    return Gradual(layer, original, o)


PRUNED = {"method": "magnitude", "target": {"sparsity": 0.5}}

METHOD = Train(
    paper="Zhu & Gupta 2017, arXiv 1710.01878",
    options=Options,
    covers={
        "gmp": [PRUNED, {"method": "gmp"}],
        "gmp-star": [
            {"method": "magnitude", "target": {"sparsity": 0.9}},
            {"method": "gmp", "options": {"sparse_from": 0.6}},
            {"method": "full"},
        ],
        "prune-ofa": [PRUNED, {"method": "gmp"}, {"method": "full", "options": {"objective": "logit-kd"}}],
        "nm-from-scratch": [
            {"method": "magnitude", "target": {"pattern": "2:4"}},
            {
                "method": "gmp",
                "options": {"sparse_from": 1.0, "until": 1.0, "every": 1, "through": True, "regrow": 2e-4},
            },
        ],
        "l1-l2-reg": [PRUNED, {"method": "gmp", "options": {"penalty": "l1"}}],
        "rpp": [PRUNED, {"method": "gmp", "options": {"penalty": "rpp"}}],
    },
    recipe=[PRUNED, {"method": "gmp"}],
    begin=begin,
    admits=admits,
    moves=True,
    restarts=restarts,
)
