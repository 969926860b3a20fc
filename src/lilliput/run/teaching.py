"""What a training step learns by: the objective it names, and the teacher as that objective needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.data.lessons import Lessons
from lilliput.errors import DataError
from lilliput.model.stored import Model
from lilliput.plan import objectives as planning
from lilliput.progress import Progress
from lilliput.run.journal import Work
from lilliput.training import opening, rollout, teacher
from lilliput.training.beside import Beside
from lilliput.training.student import Compared, Student
from lilliput.training.teacher import Notes
from lilliput.training.text import Roll, Text
from lilliput.verbs.objective import FeatureIO, Objective, Rollout, TokenIO
from lilliput.verbs.spec import Task
from lilliput.verbs.train import common


@dataclass(frozen=True)
class Teaching:
    """What is minimised. loss: of n tokens, None: no distributions are compared; compared: see `Student`."""

    spec: Objective[Any]
    options: Any
    loss: Callable[[TokenIO], Tensor] | None
    compared: Compared | None
    notes: Notes | None
    beside: Beside | None
    lessons: Lessons

    def text(self, student: Student, model: Model) -> Text:
        """The text of each step, which `student` may write: it is trained as the folder of `model`."""
        teach = None if self.notes is None else self.notes.taught
        return Text(self.lessons, teach, self.beside, self._roll(student, model))

    def _roll(self, student: Student, model: Model) -> Roll | None:
        rolled, beside = self.spec.rollout, self.beside
        if rolled is None or beside is None or not self.spec.rolls(self.options):
            return None
        known = min(len(model.source.tokenizer()), model.vocabulary)
        writer = rollout.Writer(student, beside, rollout.ends(model.skeleton.config), known)

        def roll(ids: Tensor, counts: Tensor) -> Rollout | None:
            return rolled(writer.io(ids, counts), self.options)

        return roll

    def open_maps(self, student: Student, text: Text, task: Task, progress: Progress) -> None:
        """The steps in which the objective's maps are trained alone; none for most."""
        first = self.spec.opening_loss
        steps = self.spec.opening(self.options)
        if first is None or not steps:
            return
        chosen = first

        def loss(io: FeatureIO) -> Tensor:
            return chosen(io, self.options)

        opening.open_maps(student, text, common(task.options), steps, loss, progress)


@contextmanager
def teaching(
    task: Task, model: Model, taught_by: Model, lessons: Lessons, work: Work, progress: Progress
) -> Iterator[Teaching]:
    """What `task` learns by while the context lasts; `model` is the folder that is trained. Raises LilliputError."""
    o = common(task.options)
    _, spec, options = planning.objective_of(task)
    notes: Notes | None = None
    beside: Beside | None = None
    with ExitStack() as stack:

        def weigh(log_label: Tensor) -> Tensor:
            if spec.weigh is None:
                raise RuntimeError("the objective weighs no tokens")
            return spec.weigh(log_label, options)

        weighing = None if spec.weigh is None else weigh
        temperature = spec.temperature(options)
        if spec.beside(options):
            sees = spec.sees(options)
            beside = stack.enter_context(Beside(taught_by, sees, spec.sees_last, temperature, weighing))
        if spec.teaches and (beside is None or spec.prepare is not None):
            notes = stack.enter_context(noted(taught_by, lessons, o.top, temperature, weighing, work, progress))
        prepared = options
        if spec.prepare is not None and notes is not None:
            prepared = spec.prepare(notes.each(), options)
        yield Teaching(spec, prepared, _loss(spec, prepared), _compared(task, model, taught_by), notes, beside, lessons)


def _loss(spec: Objective[Any], options: Any) -> Callable[[TokenIO], Tensor] | None:
    tokens_loss = spec.tokens_loss
    if tokens_loss is None:
        return None

    def loss(io: TokenIO) -> Tensor:
        value = tokens_loss(io, options)
        return value if io.taught is None or io.taught.weight is None else value * io.taught.weight

    return loss


def _compared(task: Task, model: Model, taught_by: Model) -> Compared | None:
    _, spec, options = planning.objective_of(task)
    compare = spec.features_loss
    if compare is None:
        return None

    def loss(io: FeatureIO) -> Tensor:
        return compare(io, options)

    torch.manual_seed(common(task.options).seed)
    maps = None if spec.maps is None else spec.maps(planning.widths(model, taught_by), options)
    maps = None if maps is None else maps.to(model.skeleton.device)
    return Compared(loss, spec.sees(options), spec.sees_last, maps, spec.maps_rate)


def noted(
    by: Model,
    lessons: Lessons,
    top: int | None,
    temperature: float,
    weigh: Callable[[Tensor], Tensor] | None,
    work: Work,
    progress: Progress,
) -> Notes:
    """The teacher's word on the text, taken once: a resumed run finds it."""
    if not bool(lessons.counts[:, 1:].any()):
        raise DataError(f"no token of {lessons.source} counts: give text with longer answers")
    done = work.folder / "taught-done"
    facts = f"{lessons.fingerprint} {top} {temperature}"
    if done.exists() and done.read_text(encoding="utf-8") == facts:
        return Notes(work.folder, lessons, top, by.vocabulary, create=False, weigh=weigh)
    done.unlink(missing_ok=True)
    notes = Notes(work.folder, lessons, top, by.vocabulary, create=True, weigh=weigh)
    teacher.take(by, lessons, notes, temperature, work.folder, progress)
    done.write_text(facts, encoding="utf-8")
    return notes
