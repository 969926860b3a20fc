"""Tables for the terminal, from the same plain data that --json prints. Readable without colour."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lilliput.report.units import duration, interval, size

Data = Mapping[str, Any]
_ROWS = 40  # longer lists are for --json
_LABELS: Mapping[str, str] = {
    "bytes": "size",
    "bits_per_weight": "bits per weight, compressed linears",
    "model_bits_per_weight": "bits per weight, whole model",
    "peak_rss_bytes": "peak RAM",
    "seconds": "time",
    "perplexity_ratio": "perplexity, ratio to the original",
    "kl": "KL divergence from the original, nats",
    "agreement": "top-1 agreement with the original",
}


def plan(data: Data) -> RenderableType:
    """What would happen: totals, then bytes by kind of tensor."""
    shown = {key: value for key, value in data.items() if key != "tensors"}
    parts = [document(shown, "plan")]
    kinds = _by_kind(data.get("tensors"))
    if kinds:
        parts.append(rows(kinds, "tensors by kind"))
    return Group(*parts)


def compress(data: Data) -> RenderableType:
    """What was predicted beside what was measured, then quality with intervals and all the rest."""
    predicted, measured = data.get("predicted") or {}, data.get("measured") or {}
    both = Table(title="compressed model", box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    both.add_column("")
    both.add_column("planned", justify="right")
    both.add_column("measured", justify="right")
    flat = [key for key in {**predicted, **measured} if _flat(predicted.get(key)) and _flat(measured.get(key))]
    for key in flat:
        both.add_row(label(key), *(cell(key, side[key]) if key in side else "" for side in (predicted, measured)))
    left = {key: value for key, value in measured.items() if key not in flat}
    rest = {key: value for key, value in data.items() if key not in ("predicted", "measured", "tensors", "rows")}
    return Group(both, document({**left, **rest}, "quality and provenance"))


def evaluation(data: Data) -> RenderableType:
    return document(data, "evaluation; in brackets the 95 % interval")


def verify(data: Data) -> RenderableType:
    return document(data, "verification")


def inspect(data: Data) -> RenderableType:
    return document(data, "anatomy")


def methods(entries: Sequence[Data]) -> RenderableType:
    """One line per method."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("method", "verb", "writes", "needs", "what it does", "paper"):
        table.add_column(name, overflow="fold", no_wrap=name in ("method", "verb", "writes"))
    for entry in entries:
        needs = ", ".join(entry["needs"]) or "-"
        table.add_row(entry["name"], entry["verb"], entry["writes"], needs, entry["summary"], entry["paper"])
    return table


def document(data: Data, title: str) -> RenderableType:
    """Any report: scalars and intervals as a table of two columns, lists below it, each under its name."""
    table = Table(title=title, box=SIMPLE_HEAD, show_header=False, title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("", overflow="fold")
    below: list[RenderableType] = []
    for key, value in data.items():
        if value is None or (isinstance(value, (list, tuple, Mapping)) and not value):
            continue
        if _flat(value):
            table.add_row(label(key), cell(key, value))
        elif isinstance(value, Mapping):
            below.append(document(value, label(key)))
        elif all(isinstance(x, Mapping) for x in value):
            below.append(rows(value, label(key)))
        elif all(not isinstance(x, (Mapping, list, tuple)) for x in value):
            if key in ("notes", "warnings", "problems"):
                below += [Padding(Text(f"{key[:-1]}: {x}"), (0, 0, 0, 2)) for x in value]
            else:
                table.add_row(label(key), ", ".join(str(x) for x in value))
    return Group(*([table] if table.row_count else []), *below)


def rows(entries: Sequence[Data], title: str) -> RenderableType:
    """A list of records: one column per key that holds something flat in any of them."""
    keys = [
        key for key in dict.fromkeys(k for entry in entries for k in entry) if any(_flat(e.get(key)) for e in entries)
    ]
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for key in keys:
        numeric = all(isinstance(e.get(key), (int, float, type(None))) for e in entries)
        table.add_column(label(key), justify="right" if numeric else "left", overflow="fold")
    for entry in entries[:_ROWS]:
        table.add_row(*(cell(key, entry[key]) if _flat(entry.get(key)) else "" for key in keys))
    if len(entries) <= _ROWS:
        return table
    return Group(table, Padding(f"and {len(entries) - _ROWS} more: --json lists them all", (0, 0, 0, 2)))


def label(key: str) -> str:
    """A key as words."""
    return _LABELS.get(key, key.removesuffix("_bytes").replace("_", " "))


def cell(key: str, value: object) -> str:
    """A value as a reader wants it, by its type and the unit in its key."""
    if isinstance(value, Mapping):
        return interval(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if key == "bytes" or key.endswith("_bytes"):
            return size(value)
        if key == "seconds" or key.endswith("_seconds"):
            return duration(value)
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return str(value)


def text(content: RenderableType, width: int = 100) -> str:
    """Plain text without colour, for files and for tests."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False).print(content)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _flat(value: object) -> bool:
    """A scalar or an interval."""
    if isinstance(value, Mapping):
        return {"value", "low", "high"} <= value.keys()
    return not isinstance(value, (list, tuple))


def _by_kind(tensors: object) -> list[dict[str, Any]]:
    """Rows {kind, tensors, bytes} from the plan's tensors: largest first."""
    if not isinstance(tensors, list) or not all(isinstance(x, Mapping) and "bytes" in x for x in tensors):
        return []
    total: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        kind = str(tensor.get("kind") or tensor.get("format") or "dense")
        row = total.setdefault(kind, {"kind": kind, "tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += int(tensor["bytes"])
    return sorted(total.values(), key=lambda row: -int(row["bytes"]))
