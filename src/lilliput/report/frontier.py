"""How small a model can get: the curve of predicted loss against bytes, as a page and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from lilliput import units
from lilliput.report import cells, figures
from lilliput.report import table as terminal
from lilliput.report.blocks import Section
from lilliput.report.cells import Table, table, words
from lilliput.report.figures import Point
from lilliput.report.page import page
from lilliput.report.svg import Picture, require

Data = Mapping[str, Any]


def render(data: Data) -> str:
    """The page of a curve, given as `Frontier.to_json` makes it.

    Raises LilliputError where matplotlib or jinja2 is not installed.
    """
    require()
    return page(
        "compare.html.j2",
        title=f"How small {data['model']} can get",
        about=f"Original: {units.size(data['original_bytes'])}{_with(data)}. Grids: {', '.join(data['menu'])}.",
        sections=[Section("frontier", "Predicted loss against bytes", [_picture(data), _table(data)])],
        headline=headline(data),
        level="unsure",
    )


def headline(data: Data) -> str:
    """Both ends of the curve in a sentence."""
    least, most = data["frontier"][0], data["frontier"][-1]
    return (
        f"From {units.size(_size(least))} with a KL divergence of {least['kl']:.3g} nats to "
        f"{units.size(_size(most))} with {most['kl']:.3g}, as predicted{_with(data)}."
    )


def _size(point: Data) -> int:
    """Bytes of the folder, and of the keys and values that count."""
    return int(point["folder_bytes"]) + int(point.get("cache_bytes") or 0)


def _with(data: Data) -> str:
    return f", keys and values of {data['context']} tokens included" if data.get("context") else ""


def show(data: Data) -> RenderableType:
    """The curve for the terminal."""
    # Where no keys and values count there is nothing to say of them.
    hide = () if data.get("context") else ("cache_bytes",)
    rows = [{k: v for k, v in x.items() if k not in ("caches", *hide)} for x in data["frontier"]]
    rows = [{**row, "chosen": _chosen(x)} for row, x in zip(rows, data["frontier"], strict=True)]
    hidden = {k: v for k, v in data.items() if k != "frontier"}
    return Group(terminal.document(hidden, "frontier"), terminal.rows(rows, "best choices; predicted KL, nats"))


def _chosen(point: Data) -> str:
    counts = {**point["chosen"], **(point.get("caches") or {})}
    return ", ".join(f"{n} x {entry}" for entry, n in counts.items())


def _picture(data: Data) -> Picture:
    points = []
    for x in data["frontier"]:
        size, kl = _size(x) / 1e6, x["kl"]
        points.append(Point(f"{x['bits']:.1f} bits", size, size, size, kl, kl, kl, best=True))
    wide, narrow = figures.pareto(
        "frontier",
        points,
        "size, MB" if data.get("context") else "size of the folder, MB",
        "KL divergence, nats",
        False,
    )
    label = f"Predicted KL divergence against size. {headline(data)}"
    return Picture(wide, narrow, label, "Every point is the best choice of its size.", _table(data))


def _table(data: Data) -> Table:
    columns = ("size", "bits per weight", "predicted KL, nats", "linears by entry")
    return table(
        columns,
        [
            (cells.size(_size(x)), cells.number(x["bits"], 3), cells.number(x["kl"], 3), words(_chosen(x)))
            for x in data["frontier"]
        ],
    )
