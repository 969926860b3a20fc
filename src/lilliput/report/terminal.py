"""The report and the comparison for a terminal: the verdict first, then what supports it. Readable without colour.

Levels are words with a sign, colour only repeats them. Whether colour is used is rich's decision: not with NO_COLOR
set, not into a file or a pipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from lilliput.report import cells
from lilliput.report.cells import Cell, Table, table, words
from lilliput.report.compare import comparison_rows, comparison_table, headline
from lilliput.report.groups import ability_table, judged_table
from lilliput.report.page import BADGES, gates, headline_figures
from lilliput.report.quality import data_table, instruction_table, task_table
from lilliput.report.scaling import headline as scaled
from lilliput.report.scaling import scaling_rows, scaling_table
from lilliput.report.sections import speed_table, use_table
from lilliput.report.verdict import verdict

Data = Mapping[str, Any]
STYLES: Mapping[str, str] = {"ok": "bold green", "loss": "bold yellow", "unsure": "bold cyan", "bad": "bold red"}
_LINEARS = 5
# What fits beside each other on 100 columns; the page and --json have all of it.
_DATA = ("data", "perplexity, × original", "KL, nats", "same top token", "perplexity")
_TASKS = ("task", "verdict", "difference", "items")
_ANSWERS = ("instructions", "win rate, a proxy", "equal answers", "tokens, original", "tokens, compressed")
_JUDGED = ("judge", "prompts", "win rate", "won, tied, lost", "p (sign test)", "same in both orders")
_SPEED = ("phase", "original, p50", "compressed, p50", "compressed, p90", "compressed, p95", "speed-up")
_MODELS = ("model", "verdict", "perplexity, × original", "KL, nats", "size", "speed, × original", "best by")


def evaluation(evidence: Data) -> RenderableType:
    """The evidence of one model: badge, sentence, large numbers, gates, data sets, tasks, speed, where the loss is."""
    answer = evidence.get("verdict") or verdict(evidence)
    level = str(answer["level"])
    parts: list[RenderableType] = [
        Text.assemble((BADGES[level], STYLES[level]), "  ", str(answer["headline"])),
        *(Padding(Text(f"- {reason}"), (0, 0, 0, 2)) for reason in answer["reasons"]),
    ]
    figures = table(
        ("", "", " "),
        [(words(x.label), Cell(x.value, tone=x.tone), words(x.below)) for x in headline_figures(evidence)],
    )
    part = evidence.get("quality") or {}
    tables = [
        figures,
        gates(evidence),
        _only(data_table(part.get("data") or ()), _DATA),
        _only(task_table(evidence.get("tasks") or ()), _TASKS),
        ability_table(evidence),
        _only(judged_table(part.get("instructions") or ()), _JUDGED),
        _only(instruction_table(part.get("instructions") or ()), _ANSWERS),
        _only(speed_table(evidence.get("speed") or {}), _SPEED),
        use_table(evidence.get("speed") or {}),
        _worst_linears(evidence.get("loss") or {}),
    ]
    parts += [grid(x) for x in tables if x is not None and x.rows]
    parts += [Padding(Text(f"note: {note}"), (0, 0, 0, 2)) for note in evidence.get("notes") or ()]
    return Group(*parts)


def comparison(evidences: Sequence[Data]) -> RenderableType:
    """Several models side by side. Raises DataError as `comparison_rows` does."""
    rows = comparison_rows(evidences)
    below = f"measured on {rows[0]['data']}" if rows[0]["data"] else ""
    return Group(Text(headline(rows)), grid(_only(comparison_table(rows), _MODELS)), Padding(Text(below), (0, 0, 0, 2)))


def scaling(evidences: Sequence[Data]) -> RenderableType:
    """Several sizes and bit widths. Raises DataError as `scaling_rows` does."""
    rows = scaling_rows(evidences)
    below = f"loss on {rows[0]['data']}"
    return Group(Text(scaled(rows)), grid(scaling_table(rows)), Padding(Text(below), (0, 0, 0, 2)))


def grid(data: Table) -> RenderableType:
    """A Table for the terminal: numbers to the right, tones as colours, intervals beside their values."""
    rich_table = RichTable(
        title=data.caption or None,
        box=SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        show_header=any(name.strip() for name in data.columns),
    )
    for i, name in enumerate(data.columns):
        numeric = any(row[i].value is not None for row in data.rows)
        rich_table.add_column(
            Text(name.strip()), justify="right" if numeric else "left", overflow="fold", no_wrap=i == 0
        )
    for row in data.rows:
        rich_table.add_row(*(Text(cell.line, style=STYLES.get(cell.tone, "")) for cell in row))
    return rich_table if not data.note else Group(rich_table, Padding(Text(data.note), (0, 0, 0, 2)))


def _only(data: Table, names: Sequence[str]) -> Table:
    places = [i for i, name in enumerate(data.columns) if name in names]
    rows = tuple(tuple(row[i] for i in places) for row in data.rows)
    return Table(tuple(data.columns[i] for i in places), rows, data.caption, note=data.note)


def _worst_linears(loss: Data) -> Table | None:
    shared = sorted((x for x in loss.get("linears") or () if x.get("share") is not None), key=lambda x: -x["share"])
    if not shared:
        return None
    rows = [
        (words(x["name"]), cells.share(x["share"]), words("exact" if x.get("exact") else "estimated"))
        for x in shared[:_LINEARS]
    ]
    return table(("linear", "share of the loss", "how"), rows, "Where the loss comes from.")
