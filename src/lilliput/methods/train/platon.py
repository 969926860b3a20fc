"""PLATON: weights stay whose sensitivity is high, or may well be: smoothed sensitivity times its uncertainty.

With w the weights, g their gradients at a step (those of weights at 0 too), and smoothing over steps by beta_1, beta_2:

    I = |w g|,   Ibar <- beta_1 Ibar + (1 - beta_1) I,   U = |I - Ibar|,   Ubar <- beta_2 Ubar + (1 - beta_2) U,
    S = Ibar * Ubar.

After every step of the optimizer the weights outside the mask of the highest S become 0, as many as s(u) says. They
may come back: their gradients move them, and what was remembered of them fades over steps.

Paper: Zhang et al. 2022, arXiv 2206.12562. Cost: two more tensors beside a weight, its gradient and two moments.
Limits: gradients are those of a step, clipped with all others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from lilliput.parts.layer import Layer
from lilliput.training.sparse import Latent, SparseOptions, admits, restarts
from lilliput.verbs.train import Train
from lilliput.verbs.trained import Trained


class Options(SparseOptions):
    """See the module's docstring."""

    every: int = Field(1, ge=1, description="steps between two masks")
    until: float = Field(0.7, gt=0.0, le=1.0, description="share of the training from which on zeros are as planned")
    smoothing: float = Field(0.85, ge=0.0, lt=1.0, description="beta_1, of the sensitivity")
    doubt: float = Field(0.95, ge=0.0, lt=1.0, description="beta_2, of its uncertainty")


class Uncertain(Latent):
    """Weights with what was seen of their sensitivity."""

    settings: Options
    sensitivity: Tensor
    uncertainty: Tensor

    def __init__(self, layer: Layer, original: Tensor, o: Options) -> None:
        super().__init__(layer, original, o)
        self.register_buffer("sensitivity", torch.zeros_like(self.value, requires_grad=False))
        self.register_buffer("uncertainty", torch.zeros_like(self.value, requires_grad=False))
        self._time = 0.0

    def state(self) -> Mapping[str, Tensor]:
        return {"mask": self.mask, "sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    def scores(self) -> Tensor:
        return self.sensitivity * self.uncertainty

    def weight(self) -> Tensor:
        # Weights outside the mask are 0 already, and their gradients count.
        return self.value

    def step(self, done: float) -> None:
        # The mask follows the step of the optimizer, when the step's gradients are known.
        self._time = self.at(done + 1 / self.settings.steps)

    def after_backward(self) -> None:
        slope = self.value.grad
        if slope is None:
            return
        o = self.settings
        with torch.no_grad():
            seen = (self.value * slope).abs()
            self.sensitivity.lerp_(seen, 1 - o.smoothing)
            self.uncertainty.lerp_((seen - self.sensitivity).abs_(), 1 - o.doubt)

    def after_step(self, rate: float) -> None:
        with torch.no_grad():
            self.mask.copy_(self.chosen(self._time))
            self.value.mul_(self.mask)

    def settled(self) -> None:
        super().settled()
        with torch.no_grad():
            self.value.mul_(self.mask)


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The original's weights, of which nothing is known."""
    return Uncertain(layer, original, o)


_PRUNED = {"method": "magnitude", "target": {"sparsity": 0.5}}

METHOD = Train(
    paper="Zhang et al. 2022, arXiv 2206.12562",
    options=Options,
    covers={"platon": [_PRUNED, {"method": "platon"}]},
    recipe=[_PRUNED, {"method": "platon"}],
    begin=begin,
    admits=admits,
    copies=7,
    moves=True,
    restarts=restarts,
)
