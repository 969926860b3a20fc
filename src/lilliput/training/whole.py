"""The whole model in memory: gradients of a batch, of all processes' parts of it, and a step of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lilliput.errors import LilliputError
from lilliput.machine import ranks
from lilliput.parts.layer import Layer
from lilliput.training import loop, sharding
from lilliput.training.loop import NotFiniteError
from lilliput.training.optimizers import AdamW, Leaf, held_back, local, sharded, summed
from lilliput.training.student import Batch, Student
from lilliput.training.text import Rows, Text
from lilliput.verbs.train import TrainOptions
from lilliput.verbs.trained import Leaves, Trained


class Place(Protocol):
    """Where files of a training lie meanwhile, the same for all processes, of which the first saves; `folder` takes
    what an optimizer keeps on disk."""

    @property
    def folder(self) -> Path: ...

    def load(self, name: str) -> Mapping[str, Tensor] | None:
        """What was saved last under a name, None: nothing."""
        ...

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """In place of that, whole or not at all."""
        ...


def of_cores(cores: Mapping[str, Leaves], o: TrainOptions) -> list[Leaf]:
    """What is trained of linears, by their names, at rates of their own."""
    found: list[Leaf] = []
    for linear, core in cores.items():
        rates = core.rates()
        for name, value in core.named_parameters():
            if value.requires_grad:
                decay = 0.0 if name in rates else o.weight_decay
                found.append(Leaf(f"{linear}.{name}", value, rates.get(name, 1.0), decay))
    return found


def leaves(student: Student, o: TrainOptions) -> tuple[Leaf, ...]:
    """What is trained: of linears, and `others`."""
    found = of_cores(student.cores(), o)
    inside = {id(x) for core in student.cores().values() for x in core.parameters()}
    for name, value in student.model.named_parameters():
        if id(value) not in inside and o.trains(name):
            value.requires_grad_()
            found.append(Leaf(name, value))
    if student.maps is not None and student.compared is not None:
        rate = student.compared.rate
        found += [Leaf(f"maps.{name}", value, rate) for name, value in student.maps.named_parameters()]
    return tuple(found)


class Whole:
    """A `loop.Trainer`."""

    def __init__(self, student: Student, text: Text, o: TrainOptions, place: Place) -> None:
        self._student, self._text, self._o = student, text, o
        self._place = place
        self._leaves = leaves(student, o)
        self._shared = any(sharded(x) for x in student.parameters())
        own = place.folder if ranks.size() == 1 or o.optimizer != "paged" else place.folder / f"rank-{ranks.rank()}"
        own.mkdir(exist_ok=True)
        self._optimizer = AdamW(self._leaves, o.optimizer, own)

    def step(self, samples: Sequence[int], now: loop.Now) -> float:
        o = self._o
        torch.manual_seed(o.seed * 1_000_003 + now.step)  # whatever is drawn is the same after a resume
        for core in self._student.cores().values():
            core.step(now.place / max(o.steps, 1))
        for leaf in self._leaves:
            leaf.value.grad = None
        rows = self._text.rows(list(samples)[ranks.share(len(samples))])
        whole = int(ranks.add(torch.tensor(rows.tokens)))
        if not whole:
            raise LilliputError("what the student has written holds no token that counts: lower lr, or lower lambda")
        total = self._backward(rows, whole)
        size = held_back(tuple(summed(self._leaves).values()), o.clip)
        if not (math.isfinite(total) and math.isfinite(size)):
            what = f"the loss is {total}" if not math.isfinite(total) else f"the gradient's norm is {size}"
            raise NotFiniteError(what)
        rate = o.lr * loop.rate(now.place, o)
        for core in self._student.cores().values():
            core.after_backward()
        self._optimizer.step(rate)
        for core in self._student.cores().values():
            core.after_step(rate)
        return total

    def _backward(self, rows: Rows, whole: int) -> float:
        """Gradients of this process's rows to the leaves; the mean loss over all of the step's `whole` tokens."""
        total = 0.0
        penalty = self._student.penalty() if ranks.lead() else None
        if penalty is not None:
            torch.autograd.backward(penalty)
        for batch in self._batches(rows):
            loss = self._student(batch) / whole
            total += float(loss.detach())
            torch.autograd.backward(loss)
        return float(ranks.add(torch.tensor(total, dtype=torch.float64)))

    def _batches(self, rows: Rows) -> Iterator[Batch]:
        """The rows, a few at a time; where processes share the model out all have as many batches, and those that are
        left hold nothing that counts."""
        own = -(-len(rows.ids) // (self._o.at_once or 1))
        # Asked before the first of them, as nothing may come between what processes do together.
        most = int(ranks.largest(torch.tensor(own))) if self._shared else own
        yield from self._text.batches(rows, self._o.at_once or 1)
        ids = self._text.lessons.ids[:1]
        for _ in range(own, most):
            yield Batch(ids, torch.zeros_like(ids, dtype=torch.bool), None, None)

    @torch.no_grad()
    def judge(self, samples: Sequence[int]) -> float:
        rows = self._text.given(list(samples)[ranks.share(len(samples))])
        with self._student.settled():
            total = sum(float(self._student(batch)) for batch in self._batches(rows))
        whole = loop.counted(self._text.lessons, samples)
        return float(ranks.add(torch.tensor(total, dtype=torch.float64))) / whole

    def save(self, done: int, facts: Mapping[str, Tensor]) -> None:
        state = {f"moment.{name}": x for name, x in self._optimizer.state(done).items()}
        ranks.met()  # all moments are durable before the state that names them, and it before any older ones go
        self._put("state", {**self._values(), **state, **{f"fact.{name}": x for name, x in facts.items()}})
        ranks.met()
        self._optimizer.settled(done)

    def restore(self) -> Mapping[str, Tensor] | None:
        saved = self._place.load("state")
        if saved is None:
            return None
        self._load(saved)
        facts = below("fact.", saved)
        self._optimizer.restore(below("moment.", saved), len(facts["losses"]))
        return facts

    def keep(self) -> None:
        self._put("best", self._values())
        ranks.met()

    def take_back(self) -> None:
        best = self._place.load("best")
        if best is None:
            raise RuntimeError("nothing was kept")
        self._load(best)

    def _values(self) -> dict[str, Tensor]:
        values = {f"value.{x.name}": x.value.detach() for x in self._leaves}
        for linear, core in self._student.cores().items():
            values |= {f"core.{linear}.{name}": x for name, x in core.state().items()}
        return values

    def _put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        whole = {}
        for key, x in tensors.items():
            value = sharding.gathered(x)
            if ranks.lead():
                whole[key] = value.contiguous().cpu()
        if ranks.lead():
            self._place.save(name, whole)

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        for x in self._leaves:
            local(x.value).copy_(sharding.part(tensors[f"value.{x.name}"], x.value))
        for linear, core in self._student.cores().items():
            for name, held in core.state().items():
                held.copy_(tensors[f"core.{linear}.{name}"])

    def results(self) -> Iterator[tuple[str, Layer | Tensor]]:
        blocks = self._student.skeleton.block_names
        for number, prefix in enumerate(blocks):
            if self._shared:
                sharding.whole_again(self._student, number, whole=True)
            yield from self._finished(f"{prefix}.", ())
            if self._shared:
                sharding.whole_again(self._student, number, whole=False)
        yield from self._finished("", tuple(f"{x}." for x in blocks))

    def _finished(self, prefix: str, but: tuple[str, ...]) -> Iterator[tuple[str, Layer | Tensor]]:
        """Results whose names begin with `prefix`, and with none of `but`."""
        cores = self._student.cores()
        own = {id(x) for core in cores.values() for x in core.parameters()}
        for name, core in cores.items():
            if isinstance(core, Trained) and name.startswith(prefix) and not name.startswith(but):
                yield name, core.finish()
        for name, value in self._student.model.named_parameters():
            if value.requires_grad and id(value) not in own and name.startswith(prefix) and not name.startswith(but):
                yield name, value.detach().clone()  # what is whole for a moment is freed afterwards

    def delete(self) -> None:
        """Remove what lies on disk, but for what `place` has saved."""
        self._optimizer.delete()


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
