"""The loop over a whole model: equal steps however a batch is cut, states to go on from, ends that are asked for."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.data.documents import Document, pack
from lilliput.data.lessons import Lessons, whole
from lilliput.errors import DataError, LilliputError
from lilliput.training import loop, student
from lilliput.training.whole import Whole
from lilliput.verbs.train import TrainOptions

QUICK = TrainOptions(steps=6, batch=3, lr=0.01, save=2)


def test_a_batch_in_pieces_is_the_whole_batch(small: Any) -> None:
    found = []
    for at_once in (1, 2, 3):
        one = small.student(checkpointing=True)
        found.append(
            (small.train(QUICK.model_copy(update={"at_once": at_once}), student=one).losses, small.values(one))
        )
    for losses, values in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=1e-6)
        assert small.equal(values, found[0][1], 1e-6)


def test_logits_in_pieces_and_blocks_run_again_change_nothing(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = small.train(QUICK.model_copy(update={"checkpointing": False})).losses
    assert small.train(QUICK).losses == plain
    monkeypatch.setattr(student, "LOGITS", 48 * 5)
    assert small.train(QUICK).losses == pytest.approx(plain, abs=1e-6)
    assert plain[-1] < plain[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "paged"])
@pytest.mark.parametrize("after", [3, 4, 5])
def test_a_training_that_was_cut_off_goes_on_as_if_nothing_had_been(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, after: int
) -> None:
    o = QUICK.model_copy(update={"optimizer": optimizer})
    one = small.student()
    whole = small.train(o, student=one).losses
    place = small.memory(tmp_path)
    plain = Whole.step

    def cut(self: Whole, samples: Sequence[int], now: loop.Now) -> float:
        if now.step == after:
            raise RuntimeError("killed")
        return plain(self, samples, now)

    monkeypatch.setattr(Whole, "step", cut)
    with pytest.raises(RuntimeError, match="killed"):
        small.train(o, place)
    monkeypatch.setattr(Whole, "step", plain)
    two = small.student()
    assert small.train(o, place, two).losses == whole
    assert small.equal(small.values(one), small.values(two))


def test_a_first_interrupt_ends_with_what_was_reached(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Whole.step

    def interrupted(self: Whole, samples: Sequence[int], now: loop.Now) -> float:
        if now.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, samples, now)

    monkeypatch.setattr(Whole, "step", interrupted)
    place = small.memory(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    curve = small.train(QUICK, place)
    assert curve.stopped == "by the keyboard, at step 3 of 6"
    assert len(curve.losses) == 3
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(Whole, "step", plain)
    assert small.train(QUICK, place).losses == small.train(QUICK).losses  # and can be gone on with


def test_a_second_interrupt_interrupts(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Whole, samples: Sequence[int], now: loop.Now) -> float:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    monkeypatch.setattr(Whole, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small.train(QUICK)


def test_minutes_end_it(small: Any) -> None:
    curve = small.train(QUICK.model_copy(update={"minutes": 1e-9}))
    assert curve.stopped == "after 1e-09 minutes, at step 0 of 6"


def test_schedules_reach_their_end_within_the_minutes(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 15))  # a look at the beginning, and two in every step
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    places: list[float] = []
    plain = loop.rate

    def seen(place: float, o: TrainOptions) -> float:
        places.append(place)
        return plain(place, o)

    monkeypatch.setattr(loop, "rate", seen)
    curve = small.train(QUICK.model_copy(update={"minutes": 2.0, "steps": 40}))
    assert len(places) == len(curve.losses) == 4
    assert places == [40 * x / 120 for x in (15, 45, 75, 105)]  # and not 0, 1, 2, 3
    assert plain(places[-1], QUICK.model_copy(update={"steps": 40})) < 0.1


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_is_named_and_the_last_state_stays(small: Any, tmp_path: Path, what: str) -> None:
    place = small.memory(tmp_path)
    one = small.student()
    trainer = small.trainer(QUICK, place, one)
    plain, order = trainer._student._loss, loop.order(6, QUICK)
    calls = 0

    def loss(io: Any) -> Tensor:
        nonlocal calls
        calls += 1
        found: Tensor = plain(io)
        bad = calls > 2 * 3 * 3 - 2  # each piece is computed twice, and the third step has three samples
        if bad and what == "gradient":
            return found + (io.logits[:, 0] - io.logits[:, 0].detach()).abs().sqrt()
        return found * float("nan") if bad else found

    one._loss = loss
    with pytest.raises(LilliputError, match=r"is nan at step 3 \(samples") as error:
        loop.train(trainer, small.lessons, QUICK, loop_progress())
    assert str(order[2]) in str(error.value)
    assert "the last good step is 2, and the state after step 2 is saved" in str(error.value)
    assert small.equal(
        small.values(one), {n.removeprefix("value."): x for n, x in place.load("state").items() if "value." in n}
    )


def loop_progress() -> Any:
    from lilliput.progress import Quiet

    return Quiet()


def test_a_batch_in_which_nothing_counts_is_refused(small: Any) -> None:
    empty = replace(small.lessons, counts=torch.zeros_like(small.lessons.counts))
    small.lessons = empty
    with pytest.raises(LilliputError, match=r"no token counts in the samples \[.*\] of step 1"):
        small.train(QUICK)


def test_a_full_disk_leaves_the_last_state(small: Any, tmp_path: Path) -> None:
    place = small.memory(tmp_path)
    plain = place.save

    def save(name: str, tensors: Mapping[str, Tensor]) -> None:
        if len(place.saved) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "training")
        plain(name, tensors)

    place.save = save
    with pytest.raises(OSError, match="No space left"):
        small.train(QUICK, place)
    place.save = plain
    assert small.train(QUICK, place).losses == small.train(QUICK).losses


def test_what_loses_least_on_samples_held_out_is_kept(small: Any, tmp_path: Path) -> None:
    o = QUICK.model_copy(update={"held_out": 0.34, "lr": 0.3, "schedule": "constant", "save": 1, "steps": 5})
    place = small.memory(tmp_path)
    one = small.student()
    curve = small.train(o, place, one)
    assert [n for n, _ in curve.held_out] == [0, 1, 2, 3, 4, 5]
    assert curve.kept == min(curve.held_out, key=lambda x: x[1])[0]
    again = small.trainer(o, small.memory(tmp_path), one)
    assert again.judge(loop.held_out(6, o)) == pytest.approx(min(x for _, x in curve.held_out), abs=1e-6)
    assert all(n < 4 for batch in loop.order(6 - len(loop.held_out(6, o)), o) for n in batch)
    with pytest.raises(DataError, match="leave none to train on"):
        loop.held_out(1, o)


def test_documents_that_share_a_row_lose_what_they_lose_alone(small: Any) -> None:
    documents = [Document(row[:n].tolist(), [True] * n) for row, n in zip(small.lessons.ids, (5, 7, 12), strict=False)]
    packed = pack(documents, rows=2, tokens=12, filler=0)
    together = Lessons.of(packed.ids, packed.counts, packed.positions, "packed")
    assert len(together) == 2
    one = small.student()
    apart = 0.0
    for document in documents:
        small.lessons = whole(torch.tensor([document.ids]), "one")
        apart += small.trainer(QUICK, student=one).judge([0]) * (len(document.ids) - 1)
    small.lessons = together
    assert small.trainer(QUICK, student=one).judge([0, 1]) == pytest.approx(apart / (5 + 7 + 12 - 3), rel=1e-5)
