"""Text that a student writes: what it is drawn from, what of it counts, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.data import lessons as texts
from lilliput.data.lessons import Lessons
from lilliput.errors import DataError, LilliputError
from lilliput.model.stored import open_model
from lilliput.parts.layer import Layer
from lilliput.training.beside import Beside
from lilliput.training.rollout import Writer, beginnings, ends
from lilliput.training.student import Student
from lilliput.training.teacher import Notes
from lilliput.training.text import Text
from lilliput.verbs.objective import Rollout
from lilliput.verbs.trained import Trained

VOCABULARY = 48


class Counted(Trained):
    """A weight that says how often it was computed."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(value)
        self.uses = 0

    def weight(self) -> Tensor:
        self.uses += 1
        return self.value

    def finish(self) -> Layer:
        raise NotImplementedError


@pytest.fixture
def student(noisy: Callable[[int], Path]) -> Student:
    model = open_model(noisy(0))
    model.load(tuple(model.skeleton.shapes))
    made = Student(model.skeleton, lambda io: io.logits.sum(-1))
    name = "model.layers.0.mlp.up_proj"
    made.place(name, Counted(model.read(f"{name}.weight").float()))
    return made


@pytest.fixture
def teacher(noisy: Callable[[int], Path]) -> Iterator[Beside]:
    with Beside(open_model(noisy(1)), frozenset(), False, 1.0) as beside:
        yield beside


def rows(count: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))
    counts = torch.ones(count, length, dtype=torch.bool)
    counts[:, 0] = False
    return ids, counts


def test_what_is_written_follows_the_mixture(student: Student, teacher: Beside) -> None:
    """The frequencies of the first token are its probabilities, for the student, the teacher, and both together."""
    writer = Writer(student, teacher, (), VOCABULARY)
    ids, counts = (x[:1].expand(3000, 5).clone() for x in rows(1, 5))
    torch.manual_seed(0)
    with torch.no_grad():
        own, other = (x.logits(x.read(ids[:1, :4])[:, -1]) for x in (student.skeleton, teacher.model.skeleton))
    for share, temperature in ((0.0, 1.0), (1.0, 1.0), (0.3, 1.0), (0.0, 2.0)):
        written, counted = writer.write(ids, counts, share, temperature, 4)
        assert torch.equal(written[:, :4], ids[:, :4])
        assert counted.sum(0).tolist() == [0, 0, 0, 0, 3000]
        found = torch.bincount(written[:, 4], minlength=VOCABULARY) / 3000
        expected = share * (other[0] / temperature).softmax(-1) + (1 - share) * (own[0] / temperature).softmax(-1)
        assert float((found - expected).abs().sum()) / 2 < 0.08


def test_a_cache_gives_what_reading_anew_gives(student: Student, teacher: Beside) -> None:
    """At a temperature near 0 the most likely token is written, by a model that reads all of it at once too."""
    ids, counts = rows(3, 12)
    torch.manual_seed(0)
    written, counted = Writer(student, teacher, (), VOCABULARY).write(ids, counts, 0.0, 1e-4, 4)
    with torch.no_grad():
        best = student.skeleton.logits(student.skeleton.read(written)).argmax(-1)
    assert torch.equal(written[:, 4:], best[:, 3:-1])
    assert counted[:, 4:].all()


def test_nothing_counts_after_an_end(student: Student, teacher: Beside) -> None:
    ids, counts = rows(8, 20)
    torch.manual_seed(0)
    stops = tuple(range(0, VOCABULARY, 6))
    written, counted = Writer(student, teacher, stops, VOCABULARY).write(ids, counts, 0.0, 3.0, 4)
    for row, kept in zip(written[:, 4:].tolist(), counted[:, 4:].tolist(), strict=True):
        first = next((n for n, token in enumerate(row) if token in stops), len(row))
        assert kept == [n <= first for n in range(len(row))]
    assert not counted.all()


def test_prompts_are_what_does_not_count(student: Student, teacher: Beside) -> None:
    ids, counts = rows(3, 10)
    counts[1, :6] = False  # an answer that begins there
    counts[2] = False  # nothing to foretell
    assert beginnings(counts, 4).tolist() == [4, 6, 10]
    torch.manual_seed(0)
    written, counted = Writer(student, teacher, (), VOCABULARY).write(ids, counts, 0.0, 1.0, 4)
    assert counted.sum(1).tolist() == [6, 4, 0]
    assert torch.equal(written[1, :6], ids[1, :6])
    with pytest.raises(LilliputError, match="leave nothing to write"):
        Writer(student, teacher, (), VOCABULARY).write(ids[:1], counts[:1], 0.0, 1.0, 10)


def test_padding_of_the_vocabulary_is_never_written(student: Student, teacher: Beside) -> None:
    torch.manual_seed(0)
    written, counted = Writer(student, teacher, (), 5).write(*rows(4, 12), 0.5, 5.0, 2)
    assert int(written[counted].max()) < 5


def test_writing_takes_no_gradient_computes_weights_once_and_follows_its_seed(
    student: Student, teacher: Beside
) -> None:
    core = next(x for x in student.modules() if isinstance(x, Counted))
    writer, found = Writer(student, teacher, (), VOCABULARY), []
    for _ in range(2):
        torch.manual_seed(7)
        core.uses = 0
        found.append(writer.write(*rows(2, 8), 0.2, 1.0, 2)[0])
        assert core.uses == 1
    assert torch.equal(*found)
    own, other = writer.judge(found[0])
    assert not own.requires_grad
    assert not other.requires_grad
    assert core.value.grad is None
    with torch.no_grad():
        core.value.mul_(2)
    assert not torch.equal(writer.judge(found[0])[0], own)  # what was kept for writing is gone


def test_logits_that_are_no_numbers_are_named(student: Student, teacher: Beside) -> None:
    core = next(x for x in student.modules() if isinstance(x, Counted))
    with torch.no_grad():
        core.value.fill_(torch.nan)
    with pytest.raises(LilliputError, match="no number at token 2: lower lr"):
        Writer(student, teacher, (), VOCABULARY).write(*rows(2, 8), 0.0, 1.0, 2)


def test_ends_come_from_the_config() -> None:
    class Config:
        def __init__(self, value: Any) -> None:
            self.eos_token_id = value

    assert [ends(Config(x)) for x in (None, 3, [3, 4])] == [(), (3,), (3, 4)]


def test_a_steps_text_is_lessons_or_what_was_written(teacher: Beside) -> None:
    ids, _ = rows(4, 6)
    lessons = texts.whole(ids, "here")
    asked: list[Any] = []

    def roll(own: Tensor, counts: Tensor) -> Rollout | None:
        asked.append(own)
        if len(asked) == 1:
            return None
        return Rollout(own + 0, counts, torch.ones(len(own), 6, 2))

    text = Text(lessons, beside=teacher, roll=roll)
    plain, written = text.rows([2, 0]), text.rows([2, 0])
    assert plain.samples == (2, 0)
    assert written.samples is None
    assert torch.equal(plain.ids, ids[[2, 0]])
    assert plain.tokens == written.tokens == 10
    batches = list(text.batches(written, 1))
    assert [x.tokens for x in batches] == [5, 5]
    assert batches[0].extra is not None
    assert batches[0].taught is not None
    assert batches[0].taught(0, 5).log_p.shape == (5, VOCABULARY)
    packed = Lessons.of(ids, lessons.counts, torch.arange(6).expand(4, 6), "here")
    with pytest.raises(DataError, match="one document a row"):
        Text(packed, beside=teacher, roll=roll)


def test_notes_know_the_text_and_weigh_a_sample_at_a_time(tmp_path: Path) -> None:
    ids, _ = rows(2, 5)
    lessons = texts.whole(ids, "here")
    log_p = torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

    def weigh(label: Tensor) -> Tensor:
        return label.softmax(0) * len(label)

    with Notes(tmp_path, lessons, 4, VOCABULARY, create=True, weigh=weigh) as notes:
        for n in range(2):
            notes.write(n, log_p[n])
        taught = notes.taught([1, 0], lessons.counts[[1, 0]])(0, 8)
        rows_of = [torch.stack([log_p[n, t, ids[n, t + 1]] for t in range(4)]) for n in (1, 0)]
        assert taught.log_label is not None
        torch.testing.assert_close(taught.log_label, torch.cat(rows_of))
        assert taught.weight is not None
        torch.testing.assert_close(taught.weight, torch.cat([weigh(x) for x in rows_of]))
        each = list(notes.each())
        assert len(each) == 2
        assert each[0].log_label is not None
        torch.testing.assert_close(each[0].log_label, rows_of[1])
