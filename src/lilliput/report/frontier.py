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
        about=f"Original: {units.size(data['original_bytes'])}. Grids: {', '.join(data['menu'])}.",
        sections=[Section("frontier", "Predicted loss against bytes", [_picture(data), _table(data)])],
        headline=headline(data),
        level="unsure",
    )


def headline(data: Data) -> str:
    """Both ends of the curve in a sentence."""
    least, most = data["frontier"][0], data["frontier"][-1]
    return (
        f"From {units.size(least['folder_bytes'])} with a KL divergence of {least['kl']:.3g} nats to "
        f"{units.size(most['folder_bytes'])} with {most['kl']:.3g}, as predicted."
    )


def show(data: Data) -> RenderableType:
    """The curve for the terminal."""
    rows = [{**x, "chosen": _chosen(x)} for x in data["frontier"]]
    hidden = {k: v for k, v in data.items() if k != "frontier"}
    return Group(terminal.document(hidden, "frontier"), terminal.rows(rows, "best choices; predicted KL, nats"))


def _chosen(point: Data) -> str:
    return ", ".join(f"{n} x {entry}" for entry, n in point["chosen"].items())


def _picture(data: Data) -> Picture:
    points = []
    for x in data["frontier"]:
        size, kl = x["folder_bytes"] / 1e6, x["kl"]
        points.append(Point(f"{x['bits']:.1f} bits", size, size, size, kl, kl, kl, best=True))
    wide, narrow = figures.pareto("frontier", points, "size of the folder, MB", "KL divergence, nats", False)
    label = f"Predicted KL divergence against size. {headline(data)}"
    return Picture(wide, narrow, label, "Every point is the best choice of its size.", _table(data))


def _table(data: Data) -> Table:
    columns = ("size", "bits per weight", "predicted KL, nats", "linears by entry")
    return table(
        columns,
        [
            (cells.size(x["folder_bytes"]), cells.number(x["bits"], 3), cells.number(x["kl"], 3), words(_chosen(x)))
            for x in data["frontier"]
        ],
    )
