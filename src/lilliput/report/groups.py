"""Tables of groups: tasks by ability, items by category, and what a judge said of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lilliput.report import cells
from lilliput.report.blocks import Block, Fold
from lilliput.report.cells import Cell, Table, table, words

Data = Mapping[str, Any]
# A verdict here is about one task or group; the tones are those of the page.
TONES: Mapping[str, str] = {"ok": "ok", "gain": "ok", "loss": "bad", "unsure": "unsure"}


def grouped(evidence: Data) -> list[Block]:
    """Abilities in the open, each task's categories where a reader asks for them."""
    abilities = ability_table(evidence)
    folds = [
        Fold(f"{x['name']} by category", group_table(x["categories"], "category"))
        for x in evidence.get("tasks") or ()
        if x.get("categories")
    ]
    return [*([abilities] if abilities.rows else []), *folds]


def ability_table(evidence: Data) -> Table:
    """The tasks pooled by ability; empty where they ask for one only."""
    rows = evidence.get("abilities") or ()
    return group_table(rows if len(rows) > 1 else (), "ability", "Tasks by what they ask for.")


def group_table(rows: Sequence[Data], kind: str, caption: str = "") -> Table:
    """Groups of items that are right or wrong, each with its paired test."""
    lines = [
        (
            words(x["name"]),
            words(x["verdict"], TONES.get(str(x["level"]), "")),
            _points(x.get("difference")),
            cells.shares(x.get("base")),
            cells.shares(x["ours"]),
            cells.number(x["items"]),
            cells.number(x.get("p_holm"), 2),
            words(x.get("tasks")),
        )
        for x in rows
    ]
    columns = (kind, "verdict", "difference", "original", "compressed", "items", "p (Holm)", "of tasks")
    return table(columns, lines, caption, note="Differences in percentage points on the same items." if lines else "")


def judged_table(rows: Sequence[Data]) -> Table:
    """What judges said of the answers to each file of instructions, then by category."""
    lines = [
        (
            words(Path(str(x["source"])).name),
            words(part["name"]),
            words(x.get("judge")),
            cells.number(part["prompts"]),
            cells.shares(part.get("win_rate")),
            words(f"{part['wins']}, {part['ties']}, {part['losses']}"),
            cells.number(part.get("p_value"), 2),
            cells.shares(part.get("consistent")),
        )
        for x in rows
        for part in x.get("judged") or ()
    ]
    columns = ("instructions", "of", "judge", "prompts", "win rate", "won, tied, lost", "p (sign test)")
    note = "Each pair is judged in both orders; it counts as won or lost where both verdicts agree." if lines else ""
    return table((*columns, "same in both orders"), lines, "Answers, judged.", note=note)


def _points(interval: Data | None) -> Cell:
    if not interval:
        return Cell(cells.MISSING)
    value, low, high = (f"{100 * interval[key]:+.1f}".replace("-", "−") for key in ("value", "low", "high"))
    return Cell(value, float(interval["value"]), below=f"[{low}, {high}]")
