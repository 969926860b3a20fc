"""What a finished compression answers with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.export.convert import Converted
from lilliput.export.engine import Look
from lilliput.metrics.evaluate import Evaluation
from lilliput.plan.plan import Plan


@dataclass(frozen=True)
class Compression:
    """A finished run: what was planned, what came out. `rows` has one entry for each compressed linear."""

    out: Path
    plan: Plan
    seconds: float
    peak_rss_bytes: int
    folder_bytes: int
    skipped: int  # blocks that an earlier, interrupted run had already finished
    evaluation: Evaluation | None
    rows: tuple[Mapping[str, Any], ...]
    warnings: tuple[str, ...]
    engine: Look | None = None  # what the engine makes of the folder; None where another process looked
    converted: Converted | None = None  # the container that took the folder's place
    evidence: Mapping[str, Any] | None = None  # what pages and comparisons are made from (docs/report.md)

    def to_json(self) -> dict[str, Any]:
        keys: tuple[str, ...] = (
            "bytes",
            "folder_bytes",
            "bits_per_weight",
            "model_bits_per_weight",
            "peak_rss_bytes",
            "seconds",
        )
        predicted = self.plan.to_json()
        if self.plan.predicted_kl is not None:
            predicted, keys = {**predicted, "kl": self.plan.predicted_kl}, (*keys, "kl")
        if self.plan.context is not None:
            keys = (*keys, *self.plan.context.to_json())
        measured: dict[str, Any] = {} if self.evaluation is None else dict(self.evaluation.to_json())
        detail = self.engine.detail if self.engine is not None else ""
        detail = self.converted.engine if self.converted is not None else detail
        measured |= {
            **({"engine": detail} if detail else {}),
            "bytes": sum(path.stat().st_size for path in self.out.glob("*.safetensors"))
            if self.converted is None
            else self.converted.bytes,
            "folder_bytes": self.folder_bytes,
            **({} if self.plan.context is None else self.plan.context.to_json()),
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }
        return {
            "out": str(self.out),
            "recipe": predicted["recipe"],
            "format": self.plan.exporter if self.converted is None else self.converted.to,
            "predicted": {key: predicted[key] for key in keys},
            "measured": measured,
            "blocks_skipped": self.skipped,
            "notes": [*self.plan.notes, *self.warnings],
            "rows": [dict(row) for row in self.rows],
            "evidence": self.evidence,
        }
