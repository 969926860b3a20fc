"""Progress on standard error: steps done, time left, and a note such as the current error.

rich draws the bar. In a log it would show nothing until the end, so the lines there are written here.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from lilliput.units import duration


class Progress:
    """Says how far a run is: a bar on a terminal, elsewhere a plain line every `every` seconds.

    A context manager; leaving it gives the terminal back. `stream` is standard error unless given.
    """

    def __init__(self, title: str = "blocks", *, stream: TextIO | None = None, every: float = 5.0) -> None:
        self.title = title
        self._stream = sys.stderr if stream is None else stream
        self._every = every
        self._bar: Bar | None = None
        self._total = -1
        self._first = 0
        self._last = 0
        self._began = 0.0
        self._printed = 0.0

    def step(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` steps are finished. Another total, or fewer done than before, begins a new phase."""
        now = time.monotonic()
        if total != self._total or done < self._last:
            self.close()
            self._total, self._first, self._began, self._printed = total, done, now, float("-inf")
        self._last = done
        remaining = self._left(done, total, now)
        if self._stream.isatty():
            self._draw(done, total, remaining, note)
        elif done >= total or now - self._printed >= self._every:
            self._printed = now
            line = ", ".join(x for x in (f"{self.title} {done}/{total}", remaining, note) if x)
            print(line, file=self._stream, flush=True)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Leave the terminal as it was. Idempotent."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._total = -1
        self._last = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _left(self, done: int, total: int, now: float) -> str:
        # Steps that an earlier run had finished say nothing about the speed of this one.
        fresh = done - self._first
        if fresh <= 0 or done >= total:
            return ""
        return f"{duration((now - self._began) / fresh * (total - done))} left"

    def _draw(self, done: int, total: int, remaining: str, note: str) -> None:
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            console = Console(file=self._stream)
            self._bar = Bar(*columns, console=console, redirect_stdout=False, redirect_stderr=False)
            self._bar.add_task(self.title, total=total, note="")
            self._bar.start()
        text = ", ".join(x for x in (remaining, note) if x)
        self._bar.update(self._bar.task_ids[0], completed=done, note=text)


class Quiet(Progress):
    """Says nothing."""

    def step(self, done: int, total: int, note: str = "") -> None:
        pass
