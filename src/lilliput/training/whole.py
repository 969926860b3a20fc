"""The whole model in memory: gradients of a batch, of all processes' parts of it, and a step of the optimizer."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lilliput.data.lessons import Lessons
from lilliput.machine import ranks
from lilliput.training import loop
from lilliput.training.loop import NotFiniteError
from lilliput.training.optimizers import AdamW, Leaf, held_back, local, sharded
from lilliput.training.student import Batch, Student
from lilliput.verbs.objective import Taught
from lilliput.verbs.train import TrainOptions

Teach = Callable[[Sequence[int], Tensor], Callable[[int, int], Taught]]


class Place(Protocol):
    """Where files of a training lie meanwhile; `folder` takes what an optimizer keeps on disk."""

    @property
    def folder(self) -> Path: ...

    def load(self, name: str) -> Mapping[str, Tensor] | None:
        """What was saved last under a name, None: nothing."""
        ...

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """In place of that, whole or not at all."""
        ...


def leaves(student: Student, o: TrainOptions) -> tuple[Leaf, ...]:
    """What is trained: of linears at rates of their own, and `others`."""
    found: list[Leaf] = []
    for linear, core in student.cores().items():
        rates = core.rates()
        for name, value in core.named_parameters():
            if value.requires_grad:
                decay = 0.0 if name in rates else o.weight_decay
                found.append(Leaf(f"{linear}.{name}", value, rates.get(name, 1.0), decay))
    inside = {id(x) for core in student.cores().values() for x in core.parameters()}
    for name, value in student.model.named_parameters():
        if id(value) not in inside and any(fnmatch.fnmatchcase(name, pattern) for pattern in o.others):
            value.requires_grad_()
            found.append(Leaf(name, value))
    return tuple(found)


class Whole:
    """A `loop.Trainer`."""

    def __init__(self, student: Student, lessons: Lessons, teach: Teach | None, o: TrainOptions, place: Place) -> None:
        self._student, self._lessons, self._teach, self._o = student, lessons, teach, o
        self._place = place
        self._leaves = leaves(student, o)
        own = place.folder if ranks.size() == 1 or o.optimizer != "paged" else place.folder / f"rank-{ranks.rank()}"
        own.mkdir(exist_ok=True)
        self._optimizer = AdamW(self._leaves, o.optimizer, own)

    def step(self, samples: Sequence[int], step: int) -> float:
        o = self._o
        torch.manual_seed(o.seed * 1_000_003 + step)  # whatever is drawn is the same after a resume
        for core in self._student.cores().values():
            core.step(step / max(o.steps, 1))
        for leaf in self._leaves:
            leaf.value.grad = None
        whole = loop.counted(self._lessons, samples)
        mine = list(samples)[ranks.share(len(samples))]
        total = self._backward(mine, whole)
        slopes = [self._summed(x.value.grad) for x in self._leaves if x.value.grad is not None]
        size = held_back(slopes, o.clip)
        if not (math.isfinite(total) and math.isfinite(size)):
            what = f"the loss is {total}" if not math.isfinite(total) else f"the gradient's norm is {size}"
            raise NotFiniteError(what)
        self._optimizer.step(o.lr * loop.rate(step, o))
        return total

    def _backward(self, samples: Sequence[int], whole: int) -> float:
        """Gradients of this process's samples to the leaves; the mean loss over all of the step's `whole` tokens."""
        o, total = self._o, 0.0
        size = o.at_once or 1
        # What processes have shared out is averaged over them on the way back, where a sum is wanted.
        factor = float(ranks.size()) if any(sharded(x.value) for x in self._leaves) else 1.0
        for a in range(0, len(samples), size):
            loss = self._student(self._batch(samples[a : a + size])) / whole
            penalty = self._student.penalty() if a == 0 and ranks.lead() else None
            total += float(loss.detach())
            (factor * (loss if penalty is None else loss + penalty)).backward()
        return float(ranks.add(torch.tensor(total, dtype=torch.float64)))

    def _summed(self, slope: Tensor) -> Tensor:
        return slope if sharded(slope) else ranks.add(slope)

    def _batch(self, samples: Sequence[int]) -> Batch:
        some, lessons = list(samples), self._lessons
        counts = lessons.counts[some]
        positions = None if lessons.positions is None else lessons.positions[some]
        return Batch(lessons.ids[some], counts, positions, None if self._teach is None else self._teach(some, counts))

    @torch.no_grad()
    def judge(self, samples: Sequence[int]) -> float:
        mine = list(samples)[ranks.share(len(samples))]
        size = self._o.at_once or 1
        total = sum(float(self._student(self._batch(mine[a : a + size]))) for a in range(0, len(mine), size))
        return float(ranks.add(torch.tensor(total, dtype=torch.float64))) / loop.counted(self._lessons, samples)

    def save(self, done: int, facts: Mapping[str, Tensor]) -> None:
        state = {f"moment.{name}": x for name, x in self._optimizer.state(done).items()}
        self._put("state", {**self._values(), **state, **{f"fact.{name}": x for name, x in facts.items()}})
        self._optimizer.settled(done)

    def restore(self) -> Mapping[str, Tensor] | None:
        saved = self._place.load("state")
        if saved is None:
            return None
        self._load(saved)
        facts = _below("fact.", saved)
        self._optimizer.restore(_below("moment.", saved), len(facts["losses"]))
        return facts

    def keep(self) -> None:
        self._put("best", self._values())

    def take_back(self) -> None:
        best = self._place.load("best")
        if best is None:
            raise RuntimeError("nothing was kept")
        self._load(best)

    def _values(self) -> dict[str, Tensor]:
        return {f"value.{x.name}": x.value.detach() for x in self._leaves}

    def _put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._place.save(name, {key: x.contiguous().cpu() for key, x in tensors.items()})

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        for x in self._leaves:
            local(x.value).copy_(tensors[f"value.{x.name}"])

    def delete(self) -> None:
        """Remove what lies on disk, but for what `place` has saved."""
        self._optimizer.delete()


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
