"""The embedding and the head, compressed once the blocks are: what the head reads is known by then.

A table is read, compressed and written a few rows at a time, for it may be the largest tensor of all. Each row of it is
a row of the head, whose inputs are what the final norm leaves, or of the embedding, which looks it up as often as its
token occurs; a tied table is compressed as the head that it is, for there an error of one row reaches every token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lilliput import export
from lilliput.anatomy.tables import multiplies
from lilliput.machine import memory, ranks
from lilliput.model.weights import TABLE_ROWS, Model
from lilliput.parts.layer import Layer
from lilliput.plan.plan import Plan
from lilliput.plan.resolve import LinearPlan
from lilliput.progress import Progress
from lilliput.run import drivers
from lilliput.run.heads import head_inputs, lookups, token_counts
from lilliput.run.journal import Work
from lilliput.run.linear import Rows, energies, fits, overflow, relative, within
from lilliput.run.output import Output
from lilliput.stats.site import SiteStats
from lilliput.streaming.states import Activations


def pending(plan: Plan, work: Work) -> tuple[LinearPlan, ...]:
    """The tables that are not written yet."""
    names = {record["name"] for record in work.find("table")}
    return tuple(x for x in plan.resolved.tables if x.name not in names)


def compress(
    plan: Plan, model: Model, ids: Tensor | None, hidden: Activations | None, work: Work, output: Output, show: Progress
) -> None:
    """Compress and write the tables of the plan that are not written yet, and note each with its report row.

    ids int64 [N, T] are this rank's samples and `hidden` [N, T, hidden] what the last block made of them; both are None
    where no step reads calibration text. The leader compresses.
    """
    tables = pending(plan, work)
    needs = frozenset().union(*(task.needs for x in tables for task in x.tasks))
    inputs = head_inputs(model, hidden, needs) if needs and hidden is not None else None
    used = None if ids is None else token_counts(ids, model.vocabulary)
    for number, table in enumerate(tables):
        show.step(number, len(tables), table.linear.role)
        stats = _stats(table, inputs, needs, model.skeleton.device)
        job = _Table(plan, model, table, stats, used)
        hashes: dict[str, str] = {}
        row: dict[str, Any] = {}
        with ranks.together():
            if ranks.lead():
                hashes = output.write_rows(job.names, job.slabs())
                row = job.row()
        work.note({"kind": "table", "name": table.name, "rows": [row], "sha256": hashes})
        memory.trim()
        show.step(number + 1, len(tables), f"{table.linear.role}, error {job.error:.4f}")


def _stats(table: LinearPlan, inputs: SiteStats | None, needs: frozenset[str], device: str) -> SiteStats:
    """What a step on a table reads: the head's inputs, or, for an embedding by itself, those that weigh all errors
    alike."""
    width = table.linear.in_features
    if inputs is None:
        return SiteStats(width, 0)
    return inputs if multiplies(table.linear) else lookups(width, needs, device)


@dataclass
class _Sums:
    """What is added up over the slabs of a table."""

    loss: float = 0.0
    whole: float = 0.0
    zeros: float = 0.0
    bits: int = 0
    seconds: float = 0.0


class _Table:
    """One table on its way into the file."""

    def __init__(self, plan: Plan, model: Model, table: LinearPlan, stats: SiteStats, used: Tensor | None) -> None:
        self._table = table
        self._model = model
        self._outcome = plan.outcomes[table.name]
        self._exporter = export.get(plan.exporter)
        self._stats = stats
        # An embedding by itself loses what its rows lose as often as they are looked up.
        self._device = model.skeleton.device
        self._used = None if multiplies(table.linear) or used is None else used.to(self._device)
        self._sums = _Sums()
        self.names = tuple(x.name for x in plan.tensors if x.source == table.name)

    @property
    def error(self) -> float:
        """Relative error of what is written so far: of the head's outputs, or of the rows as they are looked up."""
        return relative(self._sums.loss, self._sums.whole)

    def slabs(self) -> Iterator[Mapping[str, Tensor]]:
        """The stored tensors of consecutive rows, by name."""
        rows = self._outcome.out_features
        for start in range(0, rows, TABLE_ROWS):
            stop = min(rows, start + TABLE_ROWS)
            began = time.perf_counter()
            weight = self._model.read_rows(f"{self._table.name}.weight", start, stop).to(self._device).float()
            layer = Layer(self._table.name, weight)
            layer = within(layer, self._outcome.dtype, partial(drivers.applied, self._table.tasks, self._stats))
            decoded = layer.decode()
            if not fits(decoded, self._outcome.dtype):
                raise overflow(self._table.name, self._outcome.dtype)
            self._measure(weight, decoded, start, stop)
            packed = self._exporter.pack_rows(self._outcome, layer, start)
            self._sums.bits += 8 * sum(x.nbytes for x in packed.values())
            self._sums.seconds += time.perf_counter() - began
            yield {name: value.cpu().contiguous() for name, value in packed.items()}

    def row(self) -> dict[str, Any]:
        """The table's row of the report."""
        linear, sums = self._table.linear, self._sums
        return {
            "name": self._table.name,
            "methods": [task.method.name for task in self._table.tasks],
            "bits": sums.bits / linear.parameters,
            "error": self.error,
            "error_of": "output" if self._stats.gram is not None and self._used is None else "row",
            "zeros": sums.zeros / linear.parameters,
            "tokens": self._stats.count,
            "seconds": sums.seconds,
        }

    def _measure(self, weight: Tensor, decoded: Tensor, start: int, stop: int) -> None:
        change, gram = decoded - weight, self._stats.gram if self._stats.count else None
        if self._used is not None:
            often = self._used[start:stop, None].sqrt()
            change, weight, gram = change * often, weight * often, None
        loss, whole = energies(change, weight, gram)
        self._sums.loss += loss
        self._sums.whole += whole
        self._sums.zeros += float((decoded == 0).sum())


def rows(work: Work) -> Rows:
    """The report rows of the tables that are written."""
    return [row for record in work.find("table") for row in record["rows"]]
