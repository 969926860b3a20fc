"""What is trained: leaves, which are told of every step; of a linear, and the weight that they stand for, as methods of
the verb `train` return it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from lilliput.parts.layer import Layer


class Leaves(nn.Module):
    """The parameters of this module that want gradients are the leaves; they may be sharded over processes between two
    passes, so that a method reaches them by their names at every use. What they are part of is told of every step."""

    def rates(self) -> Mapping[str, float]:
        """Factors on the learning rate by the name of a parameter; 1 for those that are not named."""
        return {}

    def step(self, done: float) -> None:
        """Called before each step, with the share of the training that is done: masks, temperatures and such move."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss; None: nothing."""
        return None

    def state(self) -> Mapping[str, Tensor]:
        """Tensors beside the parameters that training changes in place, by name: what a resumed run has to know."""
        return {}

    def after_backward(self) -> None:
        """Called when the gradients of a step have arrived, those of all its samples."""

    def after_step(self, rate: float) -> None:
        """Called when the optimizer has stepped at this learning rate."""


class Trained(Leaves):
    """Of a linear. recomputes: the weight is computed anew on the way back, so that it is in memory while it is used
    alone."""

    recomputes: ClassVar[bool] = False

    def weight(self) -> Tensor:
        """The weight [out, in] for the present leaves, differentiable."""
        raise NotImplementedError

    def finish(self) -> Layer:
        """The layer for the present leaves, as it would be stored; its `decode()` is `weight()`."""
        raise NotImplementedError

    def planned(self, count: int | None, pattern: str | None) -> None:
        """Called once before training: how many weights are stored that are no zeros, and their pattern N:M, as far as
        the plan knows."""
