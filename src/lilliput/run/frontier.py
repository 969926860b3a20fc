"""How small a model can get: the best choices of all sizes, from one measuring pass and without writing a model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lilliput.errors import PlanError
from lilliput.machine import memory, ranks
from lilliput.options import Text
from lilliput.plan import choices
from lilliput.plan.choices import Point
from lilliput.progress import Progress, Quiet
from lilliput.run import choosing, sizing
from lilliput.run.journal import Work
from lilliput.run.session import Job, read, refuse_work, resolved

POINTS = 13  # sizes that are looked at


@dataclass(frozen=True)
class Frontier:
    """The curve of a model: `original_bytes` are those of the source, with keys and values of `context` tokens where
    they count."""

    model: str
    layout: str
    menu: tuple[str, ...]
    original_bytes: int
    points: Sequence[Point]
    context: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "format": self.layout,
            "menu": list(self.menu),
            "original_bytes": self.original_bytes,
            **({} if self.context is None else {"context": self.context}),
            "frontier": [asdict(x) for x in self.points],
        }


@memory.steady()
def frontier(job: Job, progress: Progress | None = None) -> Frontier:
    """Measure once what each grid would cost, and choose for many sizes. `job.fit` has the menu.

    The measuring is journalled in the job's work folder, where it names one: a killed call goes on when it is repeated.
    Raises LilliputError.
    """
    if ranks.size() > 1:
        raise PlanError(f"{ranks.size()} processes were started, but --frontier runs in a single one")
    refuse_work(job.work)
    display = Quiet() if progress is None else progress
    opened, plan = resolved(job, measured=False)
    (task,) = choices.steps(plan)
    choices.candidates(plan, task)
    plan, tokens = read(opened, plan, job.calibration, Text(windows=0))
    if tokens is None:
        raise RuntimeError("a choice by loss was planned, but there are no tokens")
    with tempfile.TemporaryDirectory() as passing, display:
        place = Path(passing) if job.work is None else job.work
        place.mkdir(parents=True, exist_ok=True)
        with Work(place / "frontier", plan.hash(tokens.fingerprint)) as work, torch.no_grad():
            choosing.measure(plan, task, opened, tokens.ids, work, display)
            predictions = choosing.predictions(plan, task, work)

    sized = sizing.sizer(plan, task, opened)
    points = choices.frontier(plan, opened, task, predictions, POINTS, sized)
    entries = choices.entries(task)
    context, whole = plan.context, choices.original(opened)
    if context is None:
        return Frontier(plan.model, plan.exporter, entries, whole, points)
    return Frontier(plan.model, plan.exporter, entries, whole + context.plain_bytes, points, context.tokens)
