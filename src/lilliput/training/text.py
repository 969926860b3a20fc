"""The text of each step, as batches: lessons, or what the student writes after their beginnings, with what a teacher
says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lilliput.data.lessons import Lessons
from lilliput.errors import DataError
from lilliput.training.beside import Beside
from lilliput.training.student import Batch
from lilliput.verbs.objective import Rollout, Taught

Teach = Callable[[Sequence[int], Tensor], Callable[[int, int], Taught]]
Roll = Callable[[Tensor, Tensor], Rollout | None]


@dataclass(frozen=True)
class Rows:
    """The rows of a step. samples: their numbers among the lessons, None: the student has written them."""

    ids: Tensor
    counts: Tensor
    positions: Tensor | None
    samples: tuple[int, ...] | None
    extra: Tensor | None

    @property
    def tokens(self) -> int:
        """How many count."""
        return int(self.counts[:, 1:].sum())


class Text:
    """teach: what a teacher has said of the lessons; beside: a teacher that is asked anew, in its place; roll: the text
    of a step in place of the lessons. Without either there is no teacher."""

    def __init__(
        self, lessons: Lessons, teach: Teach | None = None, beside: Beside | None = None, roll: Roll | None = None
    ) -> None:
        if roll is not None and lessons.positions is not None:
            raise DataError("rows of several documents cannot be gone on with: give text of one document a row")
        self.lessons = lessons
        self._teach, self._beside, self._roll = teach, beside, roll

    def rows(self, samples: Sequence[int]) -> Rows:
        """The text of a step whose lessons are `samples`."""
        some = list(samples)
        if self._roll is not None:
            own = self._roll(self.lessons.ids[some], self.lessons.counts[some])
            if own is not None:
                return Rows(own.ids, own.counts, None, None, own.extra)
        return self.given(some)

    def given(self, samples: Sequence[int]) -> Rows:
        """The lessons `samples` themselves."""
        some = list(samples)
        positions = None if self.lessons.positions is None else self.lessons.positions[some]
        return Rows(self.lessons.ids[some], self.lessons.counts[some], positions, tuple(some), None)

    def batches(self, rows: Rows, size: int) -> Iterator[Batch]:
        """`size` rows at a time."""
        for a in range(0, len(rows.ids), size):
            ids, counts = rows.ids[a : a + size], rows.counts[a : a + size]
            positions = None if rows.positions is None else rows.positions[a : a + size]
            extra = None if rows.extra is None else rows.extra[a : a + size]
            look = None if self._beside is None else self._beside.look(ids, counts, positions)
            taught: Callable[[int, int], Taught] | None = None
            if look is not None:
                taught = look.taught
            elif self._teach is not None:
                if rows.samples is None:
                    raise RuntimeError("text that a student has written needs a teacher beside it")
                taught = self._teach(rows.samples[a : a + size], counts)
            yield Batch(ids, counts, positions, taught, extra, look)
