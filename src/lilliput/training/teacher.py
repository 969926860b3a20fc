"""What a teacher says of a text, written down once: its likeliest tokens at every place, and all others as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from lilliput.data.lessons import Lessons
from lilliput.machine import memory
from lilliput.model.weights import Model
from lilliput.progress import Progress
from lilliput.streaming.forward import embed, finish, through
from lilliput.streaming.states import Activations
from lilliput.verbs.objective import Taught

LOGITS = 1 << 24  # logits that are in memory at a time


class Notes:
    """Files with the log-probabilities of `top` tokens (None: of all) at each of the places of `lessons`, and of the
    token that follows there. weigh: factors on the losses of a sample's tokens, by those.

    The teacher runs block by block with one of them in memory, or, where rows hold several documents, whole.
    """

    def __init__(
        self,
        folder: Path,
        lessons: Lessons,
        top: int | None,
        vocabulary: int,
        *,
        create: bool,
        weigh: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        samples, tokens = lessons.ids.shape
        self._lessons, self._weigh = lessons, weigh
        self.kept = vocabulary if top is None else min(top, vocabulary)
        self.whole = self.kept == vocabulary

        def states(name: str, width: int, dtype: torch.dtype) -> Activations:
            return Activations(folder / f"taught-{name}", (samples, tokens, width), dtype, create=create)

        self.log_p = states("log-p", self.kept, torch.float32)
        self.label = states("label", 1, torch.float32)
        self.ids = None if self.whole else states("ids", self.kept, torch.int32)
        self.rest = None if self.whole else states("rest", 1, torch.float32)

    def taught(self, samples: Sequence[int], counts: Tensor) -> Callable[[int, int], Taught]:
        """What is known of the tokens that count in some samples, bool [B, T], by their number among those."""
        chosen = counts[:, 1:]

        def some(states: Activations) -> Tensor:
            return torch.cat([states.read(n, n + 1) for n in samples])[:, :-1][chosen]

        log_p = some(self.log_p)
        ids = None if self.ids is None else some(self.ids)
        rest = None if self.rest is None else some(self.rest)[:, 0]
        label = some(self.label)[:, 0]
        weights: Tensor | None = None
        if self._weigh is not None:
            rows = torch.split(label, chosen.sum(1).tolist())
            weights = torch.cat([self._weigh(x) for x in rows])

        def piece(a: int, b: int) -> Taught:
            return Taught(
                log_p[a:b],
                None if ids is None else ids[a:b].long(),
                None if rest is None else rest[a:b],
                label[a:b],
                None if weights is None else weights[a:b],
            )

        return piece

    def each(self) -> Iterator[Taught]:
        """What is known of the tokens that count, a sample at a time."""
        for n in range(len(self._lessons)):
            counts = self._lessons.counts[n : n + 1]
            yield self.taught([n], counts)(0, int(counts[:, 1:].sum()))

    def write(self, sample: int, log_p: Tensor) -> None:
        """Of all tokens of a sample, log_p [T, V]."""
        following = self._lessons.ids[sample, 1:, None]
        self.label.write(sample, torch.nn.functional.pad(log_p[:-1].gather(1, following), (0, 0, 0, 1))[None])
        if self.ids is None or self.rest is None:
            self.log_p.write(sample, log_p[None])
            return
        kept, ids = log_p.topk(self.kept, dim=-1)
        others = log_p.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        self.log_p.write(sample, kept[None])
        self.ids.write(sample, ids[None])
        self.rest.write(sample, others[None])

    def close(self) -> None:
        for x in (self.log_p, self.label, self.ids, self.rest):
            if x is not None:
                x.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def take(teacher: Model, lessons: Lessons, notes: Notes, temperature: float, folder: Path, progress: Progress) -> None:
    """Fill `notes` with the teacher's distributions, softmax(z / temperature)."""
    if lessons.positions is None:
        _streamed(teacher, lessons, notes, temperature, folder, progress)
    else:
        _whole(teacher, lessons, notes, temperature, progress)
    memory.trim()


def _streamed(
    teacher: Model, lessons: Lessons, notes: Notes, temperature: float, folder: Path, progress: Progress
) -> None:
    skeleton = teacher.skeleton
    shape = (*lessons.ids.shape, skeleton.hidden_size)
    count = len(skeleton.block_names)
    with (
        torch.no_grad(),
        Activations(folder / "taught-in", shape, skeleton.dtype, create=True) as inputs,
        Activations(folder / "taught-out", shape, skeleton.dtype, create=True) as outputs,
    ):
        batches = embed(teacher, lessons.ids, 1, inputs)
        for n in range(count):
            progress.step(n, count, "teacher")
            teacher.load_block(n)
            for run in through(skeleton, n, batches, inputs, outputs):
                run()
            teacher.unload_block(n)
            inputs, outputs = outputs, inputs
        finish(teacher, inputs)
        head = _head(teacher)
        teacher.load(head)
        for n in range(len(lessons)):
            _note(teacher, notes, n, inputs.read(n, n + 1).to(skeleton.device)[0], temperature)
        teacher.unload(head)
        progress.step(count, count, "teacher")
        inputs.delete()
        outputs.delete()


def _whole(teacher: Model, lessons: Lessons, notes: Notes, temperature: float, progress: Progress) -> None:
    skeleton, names = teacher.skeleton, tuple(teacher.skeleton.shapes)
    teacher.load(names)
    with torch.no_grad():
        for n in range(len(lessons)):
            progress.step(n, len(lessons), "teacher")
            positions = None if lessons.positions is None else lessons.positions[n : n + 1]
            _note(teacher, notes, n, skeleton.read(lessons.ids[n : n + 1], positions)[0], temperature)
    teacher.unload(names)


def _head(model: Model) -> tuple[str, ...]:
    stem = model.skeleton.head.rpartition(".")[0]
    return tuple(n for n in model.skeleton.shapes if n == model.skeleton.head or n.rpartition(".")[0] == stem)


def _note(teacher: Model, notes: Notes, sample: int, finished: Tensor, temperature: float) -> None:
    skeleton = teacher.skeleton
    step = max(1, LOGITS // skeleton.shapes[skeleton.head][0])
    pieces = [
        (skeleton.logits(finished[a : a + step]) / temperature).log_softmax(-1).cpu()
        for a in range(0, len(finished), step)
    ]
    notes.write(sample, torch.cat(pieces))
