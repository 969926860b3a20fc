"""The model that is trained: transformers' own, with what is trained of its linears in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import LilliputError
from lilliput.runtime import caches
from lilliput.runtime.inputs import Rounding
from lilliput.training.beside import Look, head
from lilliput.training.watch import watching
from lilliput.verbs.objective import FeatureIO, Seen, Taught, TokenIO
from lilliput.verbs.trained import Leaves, Trained

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
        self._still: Tensor | None = None

    def hold(self, still: bool) -> None:
        """Keep the present weight for as long as the leaves stay as they are, or compute it at every use again."""
        self._still = self.core.weight().detach() if still else None

    def forward(self, x: Tensor) -> Tensor:
        if self._rounding is not None:
            x = _Through.apply(x, self._rounding)  # type: ignore[no-untyped-call]
        if self._still is None and self.core.recomputes and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._product, x, use_reentrant=False)
            return out
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        weight = self.core.weight() if self._still is None else self._still
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def penalties(cores: Sequence[Leaves]) -> Tensor | None:
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
    """ids, counts [B, T] as in `Lessons`, positions the same or None; taught: for the tokens that count, in order;
    extra: float32 [B, T, k], as in `Rollout`; look: of a teacher beside the student."""

    ids: Tensor
    counts: Tensor
    positions: Tensor | None
    taught: Callable[[int, int], Taught] | None
    extra: Tensor | None = None
    look: Look | None = None

    @property
    def tokens(self) -> int:
        """How many count."""
        return int(self.counts[:, 1:].sum())


@dataclass(frozen=True)
class Compared:
    """What models show is compared: loss: a scalar; fields, last: as in `watching`; maps: trained with the student and
    left behind; rate: factor on their learning rate."""

    loss: Callable[[FeatureIO], Tensor]
    fields: frozenset[str]
    last: bool = False
    maps: nn.Module | None = None
    rate: float = 1.0


class Student(nn.Module):
    """Calling it gives the sum of the losses of a batch's tokens that count; `loss`: of n tokens, [n]; compared: what
    each of them loses besides."""

    def __init__(
        self,
        skeleton: Skeleton,
        loss: Callable[[TokenIO], Tensor] | None,
        compared: Compared | None = None,
        *,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model = skeleton.model
        self.maps = None if compared is None else compared.maps
        self.skeleton = skeleton
        self.compared = compared
        self._loss = loss
        if checkpointing and compared is None:  # what is compared is kept anyway
            for n in range(len(skeleton.block_names)):
                _checkpointed(skeleton.block(n))

    def place(self, name: str, core: Trained) -> None:
        """Put what is trained of the linear `name` in its place."""
        parent, _, own = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        linear = owner.get_submodule(own)
        rounding: Rounding | None = linear.__dict__.get("_lilliput_inputs")
        owner._modules[own] = TrainedLinear(core, linear._parameters.get("bias"), rounding)

    def cores(self) -> Mapping[str, Leaves]:
        """What is trained, by the name of the linear."""
        return {name.removesuffix(".core"): x for name, x in self.model.named_modules() if isinstance(x, Trained)}

    def penalty(self) -> Tensor | None:
        """What is added to the loss of a batch."""
        return penalties(tuple(self.cores().values()))

    @contextmanager
    def settled(self) -> Iterator[None]:
        """While the context lasts, the model computes what it will once trained: nothing is left out by chance."""
        yield

    @contextmanager
    def still(self) -> Iterator[None]:
        """While the context lasts, it does so, no weight changes, and each is computed once."""
        linears = [x for x in self.model.modules() if isinstance(x, TrainedLinear)]
        try:
            for x in linears:
                x.hold(True)
            with self.settled():
                yield
        finally:
            for x in linears:
                x.hold(False)

    def forward(self, batch: Batch) -> Tensor:
        cache = caches.training(self.model, self.skeleton.config)
        if cache is not None and batch.positions is not None:
            raise LilliputError(
                "rows that hold several documents cannot be trained with a compressed cache, whose masks let them see "
                "each other: take text without documents, or leave the step for the cache out"
            )
        compared = self.compared
        with watching(
            self.skeleton, frozenset() if compared is None else compared.fields, compared is not None and compared.last
        ) as shown:
            hidden = self.read(batch, cache)
        total = hidden.new_zeros((), dtype=torch.float32)
        if self._loss is not None:
            total = total + self.tokens(batch, hidden)
        if compared is not None:
            total = total + batch.tokens * compared.loss(self.features(batch, shown))
        return total

    def read(self, batch: Batch, cache: Any) -> Tensor:
        """What the head reads of a batch, [B, T, H]."""
        return self.skeleton.read(batch.ids, batch.positions, cache)

    def features(self, batch: Batch, shown: Callable[[], Seen]) -> FeatureIO:
        """What the objective compares of a batch. Raises RuntimeError where no teacher has looked at it."""
        if batch.look is None:
            raise RuntimeError("models are compared, and no teacher runs beside the student")
        counts = nn.functional.pad(batch.counts[:, 1:], (0, 1))
        labels = nn.functional.pad(batch.ids[:, 1:], (0, 1))
        heads = (lambda x: head(self.skeleton, x), batch.look.head)
        device = self.skeleton.device
        return FeatureIO(shown(), batch.look.seen, counts.to(device), labels.to(device), self.maps, heads)

    def tokens(self, batch: Batch, hidden: Tensor) -> Tensor:
        """What the distributions of a batch lose, from what the head reads, [B, T, H]; the head is loaded."""
        chosen = batch.counts[:, 1:].to(hidden.device)
        states, labels = hidden[:, :-1][chosen], batch.ids[:, 1:].to(hidden.device)[chosen]
        extra = None if batch.extra is None else batch.extra[:, 1:].to(hidden.device)[chosen]
        step = max(1, LOGITS // self.skeleton.shapes[self.skeleton.head][0])
        total = states[:0].float().sum()  # where nothing counts, gradients are 0, and not missing
        for a in range(0, len(states), step):
            b = min(a + step, len(states))
            taught = None if batch.taught is None else batch.taught(a, b)
            more = None if extra is None else extra[a:b]
            total = total + self._piece(states[a:b], labels[a:b], taught, more)
        return total

    def _piece(self, states: Tensor, labels: Tensor, taught: Taught | None, extra: Tensor | None) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            if self._loss is None:
                raise RuntimeError("no distributions are compared")
            return self._loss(TokenIO(self.skeleton.logits(x), labels, taught, extra)).sum()

        if not torch.is_grad_enabled():
            return loss(states)
        out: Tensor = checkpoint(loss, states, use_reentrant=False)
        return out
