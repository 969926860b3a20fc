"""Progress: what is said, how often, and how the time left is reckoned."""

from __future__ import annotations

import io

import pytest

from lilliput.progress import Progress, Quiet


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def clock(monkeypatch: pytest.MonkeyPatch, times: list[float]) -> None:
    monkeypatch.setattr("lilliput.progress.time.monotonic", iter(times).__next__)


def test_plain_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, [0, 1, 2, 6, 7, 8])
    out = io.StringIO()
    progress = Progress(stream=out, every=5)
    for done, note in enumerate(["", "a", "b", "error 0.01", "c", "end"]):
        progress.step(done, 5, note)
    assert out.getvalue().splitlines() == ["blocks 0/5", "blocks 3/5, 4.0 s left, error 0.01", "blocks 5/5, end"]


def test_blocks_of_an_earlier_run_do_not_shorten_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, [0, 10])
    out = io.StringIO()
    progress = Progress(stream=out, every=0)
    progress.step(8, 12)
    progress.step(9, 12)
    assert out.getvalue().splitlines()[-1] == "blocks 9/12, 30 s left"


def test_a_new_phase_starts_a_new_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, [0, 100, 200, 201])
    out = io.StringIO()
    progress = Progress(stream=out, every=0)
    progress.step(0, 3)
    progress.step(1, 3)
    progress.step(0, 2)
    progress.step(1, 2)
    assert out.getvalue().splitlines()[-1] == "blocks 1/2, 1.0 s left"


def test_a_terminal_gets_a_bar_and_is_given_back() -> None:
    out = Terminal()
    with Progress(stream=out) as progress:
        progress.step(1, 4, "error 0.02")
    assert "1/4" in out.getvalue()
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h")


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Quiet() as progress:
        progress.step(1, 2)
    assert capfd.readouterr() == ("", "")
