"""The loop that trains a whole model: steps in their order, a state to go on from, an end that can be asked for."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from lilliput.data.lessons import Lessons
from lilliput.errors import DataError, LilliputError
from lilliput.machine import ranks
from lilliput.parts.layer import Layer
from lilliput.progress import Progress
from lilliput.verbs.train import TrainOptions


class NotFiniteError(LilliputError):
    """A loss or a gradient that is no number; the loop says where."""


@dataclass(frozen=True)
class Now:
    """Where a training is. step: its number, from 0; place: the same on the way from 0 to `steps`, or further on where
    `minutes` end it before."""

    step: int
    place: float


class Trainer(Protocol):
    """What is trained, and how: see `whole` and `streamed`. Of several processes all make the same calls."""

    def step(self, samples: Sequence[int], now: Now) -> float:
        """Carry out a step; the mean loss of its tokens before it. Raises NotFiniteError and leaves what is trained as
        it was where that is no number."""
        ...

    def judge(self, samples: Sequence[int]) -> float:
        """The mean loss of the tokens of some samples; nothing changes."""
        ...

    def save(self, done: int, facts: Mapping[str, Tensor]) -> None:
        """Make durable what the training goes on from after so many steps, with some facts about it; in place of what
        was saved before, whole or not at all. Raises OSError, also for a full disk."""
        ...

    def restore(self) -> Mapping[str, Tensor] | None:
        """Go on from there; the facts, None where nothing was saved."""
        ...

    def keep(self) -> None:
        """Remember, durably, what is trained as it is now."""
        ...

    def take_back(self) -> None:
        """What is trained becomes what was kept last."""
        ...

    def results(self) -> Iterator[tuple[str, Layer | Tensor]]:
        """What is trained as it is now, by name: linears as they are stored, other tensors as they are.
        Each is there until the next is asked for."""
        ...


@dataclass(frozen=True)
class Curve:
    """How a training went. losses: mean over the tokens of each step; held_out: mean loss of the samples that were not
    trained on, after so many steps; kept: after how many steps what is kept was reached; stopped: why it ended before
    the last step."""

    losses: tuple[float, ...]
    seconds: float
    stopped: str | None = None
    held_out: tuple[tuple[int, float], ...] = ()
    kept: int | None = None


class Stop:
    """While the context lasts a first Ctrl-C only asks for an end; a second one interrupts, as always."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


@dataclass
class _History:
    """What is known of the steps so far."""

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    def facts(self) -> dict[str, Tensor]:
        return {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "held_out": torch.tensor(self.held_out, dtype=torch.float64).reshape(-1, 2),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
        }

    def take_up(self, facts: Mapping[str, Tensor]) -> None:
        self.losses = facts["losses"].tolist()
        self.held_out = [(int(n), value) for n, value in facts["held_out"].tolist()]
        self.seconds = float(facts["seconds"])

    @property
    def best(self) -> int | None:
        """After how many steps the samples that were not trained on lost least."""
        return min(self.held_out, key=lambda x: x[1])[0] if self.held_out else None


def order(count: int, o: TrainOptions) -> list[list[int]]:
    """The samples of each step: every sample once before any comes again."""
    generator = torch.Generator().manual_seed(o.seed)
    line: list[int] = []
    out: list[list[int]] = []
    for _ in range(o.steps):
        while len(line) < o.batch:
            line += torch.randperm(count, generator=generator).tolist()
        out.append(line[: o.batch])
        line = line[o.batch :]
    return out


def held_out(count: int, o: TrainOptions) -> range:
    """The samples that are not trained on, the last ones. Raises DataError where no others are left."""
    some = max(1, round(o.held_out * count)) if o.held_out else 0
    if some >= count:
        raise DataError(f"{count} samples, and {o.held_out:g} of them held out, leave none to train on: give more text")
    return range(count - some, count)


def rate(place: float, o: TrainOptions) -> float:
    """The factor on the learning rate at a place from 0 to `steps`."""
    warm = max(1, round(o.warmup * o.steps)) if o.warmup else 0
    if place < warm:
        return min((place + 1) / warm, 1.0)
    if o.schedule == "constant":
        return 1.0
    done = (place - warm) / max(1, o.steps - warm)
    return 1 - done if o.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def counted(lessons: Lessons, samples: Sequence[int]) -> int:
    """How many tokens of some samples are to be foretold."""
    return int(lessons.counts[list(samples)][:, 1:].sum())


def train(trainer: Trainer, lessons: Lessons, o: TrainOptions, progress: Progress) -> Curve:
    """Carry out the steps, from the last saved state on where there is one.

    Raises LilliputError where a loss is not finite, with the batch; the last good state stays saved. A first Ctrl-C
    ends the training with what it has reached.
    """
    history, stopped = _History(), None
    if (facts := trainer.restore()) is not None:
        history.take_up(facts)
    judged = held_out(len(lessons), o)
    plan = order(len(lessons) - len(judged), o)
    saved, began = len(history.losses), time.monotonic() - history.seconds

    def save() -> None:
        nonlocal saved
        done = len(history.losses)
        if judged and (not history.held_out or history.held_out[-1][0] < done):
            history.held_out.append((done, trainer.judge(judged)))
            if history.best == done:
                trainer.keep()
        trainer.save(done, history.facts())
        saved = done

    with Stop() as stop:
        if judged and not history.losses:
            save()
        for step in range(len(history.losses), o.steps):
            seconds = time.monotonic() - began
            stopped, place = ranks.agreed((_reason(stop, seconds, o), _place(step, seconds, o)))
            if stopped is not None:
                break
            history.losses.append(_step(trainer, lessons, plan[step], Now(step, place), saved))
            history.seconds = time.monotonic() - began
            progress.step(step + 1, o.steps, f"loss {history.losses[-1]:.4f}")
            if (step + 1) % o.save == 0 and step + 1 < o.steps:
                save()
        if saved < len(history.losses):
            save()  # what follows may be interrupted too
    done = len(history.losses)
    if history.best not in (None, done):
        trainer.take_back()
    if stopped is not None:
        stopped = f"{stopped}, at step {done} of {o.steps}"
    return Curve(tuple(history.losses), history.seconds, stopped, tuple(history.held_out), history.best)


def _reason(stop: Stop, seconds: float, o: TrainOptions) -> str | None:
    if stop.asked:
        return "by the keyboard"
    return f"after {o.minutes:g} minutes" if o.minutes is not None and seconds > 60 * o.minutes else None


def _place(step: int, seconds: float, o: TrainOptions) -> float:
    return step if o.minutes is None else max(step, min(seconds / (60 * o.minutes), 1.0) * o.steps)


def _step(trainer: Trainer, lessons: Lessons, samples: Sequence[int], now: Now, saved: int) -> float:
    step = now.step
    if not counted(lessons, samples):
        raise LilliputError(
            f"no token counts in the samples {list(samples)} of step {step + 1}: give text with longer answers, or "
            "larger batches"
        )
    try:
        return trainer.step(samples, now)
    except NotFiniteError as error:
        good = f"the state after step {saved} is saved" if saved else "no earlier state is saved"
        raise LilliputError(
            f"{error} at step {step + 1} (samples {list(samples)}); the last good step is {step}, and {good}: lower "
            "lr, or check the text of these samples"
        ) from None
