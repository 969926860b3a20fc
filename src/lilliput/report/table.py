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

from lilliput.units import duration, interval, size

Data = Mapping[str, Any]
_ROWS = 40  # longer lists are for --json
_LABELS: Mapping[str, str] = {
    "bytes": "size",
    "folder_bytes": "size of the folder",
    "bits_per_weight": "bits per weight, compressed linears",
    "model_bits_per_weight": "bits per weight, whole model",
    "peak_rss_bytes": "peak RAM",
    "seconds": "time",
    "context": "context, tokens",
    "cache_bytes": "keys and values",
    "cache_plain_bytes": "keys and values as they are",
    "perplexity_ratio": "perplexity, ratio to the original",
    "kl": "KL divergence from the original, nats",
    "agreement": "top-1 agreement with the original",
}


def plan(data: Data) -> RenderableType:
    """What would happen: totals, then bytes by kind of tensor."""
    hidden = ("tensors", "by_kind", "recipe")
    entries = {"recipe": recipe(data.get("recipe")), **{k: v for k, v in data.items() if k not in hidden}}
    kinds = [{"kind": kind, **row} for kind, row in (data.get("by_kind") or {}).items()]
    parts = [document(entries, "plan")]
    if kinds:
        parts.append(rows(sorted(kinds, key=lambda row: -int(row["bytes"])), "tensors by kind"))
    return Group(*parts)


def compress(data: Data) -> RenderableType:
    """What was predicted beside what was measured, then quality with intervals and all the rest."""
    predicted, measured = data.get("predicted") or {}, data.get("measured") or {}
    both = Table(title="compressed model", box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    both.add_column("")
    both.add_column("planned", justify="right")
    both.add_column("measured", justify="right")
    for key, value in predicted.items():
        both.add_row(*_cells(label(key), cell(key, value), cell(key, measured[key]) if key in measured else ""))
    hidden = ("predicted", "measured", "rows", "recipe", "notes", "evidence")
    evidence, notes = data.get("evidence") or {}, data.get("notes") or ()
    rest = {
        "recipe": recipe(data.get("recipe")),
        **{key: value for key, value in measured.items() if key not in predicted and not evidence},
        **{key: value for key, value in data.items() if key not in hidden},
        "notes": [x for x in notes if x not in (evidence.get("notes") or ())],
    }
    if not evidence:
        return Group(both, document(rest, "quality and provenance; in brackets the 95 % interval"))
    from lilliput.report import terminal  # which builds on these tables

    return Group(both, document(rest, "provenance"), terminal.evaluation(evidence))


def recipe(data: object) -> str | None:
    """A recipe in one line: "w4: gptq"."""
    if not isinstance(data, Mapping):
        return None if data is None else str(data)
    steps = " then ".join(str(step["method"]) for step in data.get("steps", ()))
    return f"{data.get('name', 'recipe')}: {steps}"


def evaluation(data: Data) -> RenderableType:
    return document(data, "evaluation; in brackets the 95 % interval")


def convert(data: Data) -> RenderableType:
    return document(data, "converted")


def verify(data: Data) -> RenderableType:
    return document(data, "verification")


def inspect(data: Data) -> RenderableType:
    return document(data, "anatomy")


def methods(entries: Sequence[Data]) -> RenderableType:
    """A few lines per method; the page of a method says the rest: what it writes, its paper, its options."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("method", "verb"):
        table.add_column(name, no_wrap=True)
    table.add_column("needs", max_width=8)
    table.add_column("what it does")
    for entry in entries:
        needs = ", ".join(entry["needs"]) or "-"
        table.add_row(*_cells(entry["name"], entry["verb"], needs, entry["summary"]))
    return table


def metrics(entries: Sequence[Data]) -> RenderableType:
    """A few lines per metric: what it is, and the command that measures it."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("metric", no_wrap=True)
    table.add_column("what it is")
    table.add_column("measured by", overflow="fold")
    for entry in entries:
        table.add_row(*_cells(entry["name"], entry["summary"], entry["how"]))
    return table


def spread(data: Data) -> RenderableType:
    """Figures over the calibration seeds, then the runs."""
    figures = [{**row, "name": label(row["name"])} for row in data["figures"]]
    return Group(
        document({"model": data["model"], "measured_on": data["data"]}, "spread over calibration seeds"),
        rows(figures, "over the seeds"),
        rows(data["runs"], "runs"),
    )


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
            table.add_row(*_cells(label(key), cell(key, value)))
        elif isinstance(value, Mapping):
            below.append(document(value, label(key)))
        elif all(isinstance(x, Mapping) for x in value):
            below.append(rows(value, label(key)))
        elif all(not isinstance(x, (Mapping, list, tuple)) for x in value):
            if key in ("notes", "warnings", "problems"):
                below += [Padding(Text(f"{key[:-1]}: {x}"), (0, 0, 0, 2)) for x in value]
            else:
                table.add_row(*_cells(label(key), ", ".join(str(x) for x in value)))
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
        table.add_row(*_cells(*(cell(key, entry[key]) if _flat(entry.get(key)) else "" for key in keys)))
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


def _cells(*words: str) -> list[Text]:
    """Cells as they are: names such as [lm_head] or 2:4: are no markup."""
    return [Text(word) for word in words]


def _flat(value: object) -> bool:
    """A scalar or an interval."""
    if isinstance(value, Mapping):
        return {"value", "low", "high"} <= value.keys()
    return not isinstance(value, (list, tuple))
