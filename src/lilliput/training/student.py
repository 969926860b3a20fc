"""The model that is trained: transformers' own, with what is trained of its linears in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lilliput.anatomy.skeleton import Skeleton
from lilliput.runtime.inputs import Rounding
from lilliput.verbs.objective import Taught, TokenIO
from lilliput.verbs.trained import Trained

LOGITS = 1 << 24  # logits that are in memory at a time


class _Through(torch.autograd.Function):
    """Rounded inputs, whose gradients are those of the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding) -> Tensor:
        return rounding.of(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0], None


class TrainedLinear(nn.Module):
    """In place of a linear of transformers' model while it is trained. rounding: of its inputs, straight through."""

    def __init__(self, core: Trained, bias: nn.Parameter | None, rounding: Rounding | None = None) -> None:
        super().__init__()
        self.core = core
        self.bias = bias
        self._rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        if self._rounding is not None:
            x = _Through.apply(x, self._rounding)  # type: ignore[no-untyped-call]
        return nn.functional.linear(x, self.core.weight().to(x.dtype), self.bias)


def penalties(cores: Sequence[Trained]) -> Tensor | None:
    """What some linears add to the loss, None: nothing."""
    terms = [x for core in cores if (x := core.penalty()) is not None]
    return None if not terms else torch.stack(terms).sum()


def _checkpointed(block: nn.Module) -> None:
    """From now on a block keeps its inputs alone for the way back, and runs again there."""
    inner = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, use_reentrant=False, **kwargs)

    block.__dict__["forward"] = forward


@dataclass(frozen=True)
class Batch:
    """ids, counts [B, T] as in `Lessons`, positions the same or None; taught: for the tokens that count, in order."""

    ids: Tensor
    counts: Tensor
    positions: Tensor | None
    taught: Callable[[int, int], Taught] | None

    @property
    def tokens(self) -> int:
        """How many count."""
        return int(self.counts[:, 1:].sum())


class Student(nn.Module):
    """Calling it gives the sum of the losses of a batch's tokens that count; `loss`: of n tokens, [n]."""

    def __init__(self, skeleton: Skeleton, loss: Callable[[TokenIO], Tensor], *, checkpointing: bool = False) -> None:
        super().__init__()
        self.model = skeleton.model
        self._skeleton = skeleton
        self._loss = loss
        if checkpointing:
            for n in range(len(skeleton.block_names)):
                _checkpointed(skeleton.block(n))

    def place(self, name: str, core: Trained) -> None:
        """Put what is trained of the linear `name` in its place."""
        parent, _, own = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        linear = owner.get_submodule(own)
        rounding: Rounding | None = linear.__dict__.get("_lilliput_inputs")
        owner._modules[own] = TrainedLinear(core, linear._parameters.get("bias"), rounding)

    def cores(self) -> Mapping[str, Trained]:
        """What is trained, by the name of the linear."""
        return {name.removesuffix(".core"): x for name, x in self.model.named_modules() if isinstance(x, Trained)}

    def penalty(self) -> Tensor | None:
        """What is added to the loss of a batch."""
        return penalties(tuple(self.cores().values()))

    def forward(self, batch: Batch) -> Tensor:
        hidden = self._skeleton.read(batch.ids, batch.positions)
        chosen = batch.counts[:, 1:]
        states, labels = hidden[:, :-1][chosen], batch.ids[:, 1:][chosen]
        step = max(1, LOGITS // self._skeleton.shapes[self._skeleton.head][0])
        total = states.new_zeros(())
        for a in range(0, len(states), step):
            b = min(a + step, len(states))
            total = total + self._piece(states[a:b], labels[a:b], None if batch.taught is None else batch.taught(a, b))
        return total

    def _piece(self, states: Tensor, labels: Tensor, taught: Taught | None) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            return self._loss(TokenIO(self._skeleton.logits(x), labels, taught)).sum()

        if not torch.is_grad_enabled():
            return loss(states)
        out: Tensor = checkpoint(loss, states, use_reentrant=False)
        return out
