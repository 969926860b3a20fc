"""Tables as data: what the page and the terminal print, with each cell's number for sorting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lilliput import units

Data = Mapping[str, Any]
MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """`text` as it is shown, `below` it its interval, if any; `value` sorts it, where it is a number; `tone` is a level
    of the verdict, or empty."""

    text: str
    value: float | None = None
    tone: str = ""
    below: str = ""

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"{self.text} {self.below}".strip()


@dataclass(frozen=True)
class Table:
    """`rows` hold a cell for each name in `columns`; `sortable` tables get buttons in their head."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    sortable: bool = False
    note: str = ""


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    caption: str = "",
    *,
    sortable: bool = False,
    note: str = "",
) -> Table:
    """A Table without the columns in which no row has anything to say."""
    whole = [tuple(row) for row in rows]
    filled = [i for i in range(len(columns)) if any(row[i].text not in ("", MISSING) for row in whole)]
    names = tuple(columns[i] for i in filled)
    return Table(names, tuple(tuple(row[i] for i in filled) for row in whole), caption, sortable, note)


def number(x: float | None, digits: int = 4) -> Cell:
    """A plain figure, three digits grouped, `digits` significant ones."""
    if x is None:
        return Cell(MISSING)
    return Cell(f"{x:,}" if isinstance(x, int) else f"{x:,.{digits}g}", float(x))


def size(x: float | None) -> Cell:
    return Cell(MISSING) if x is None else Cell(units.size(x), float(x))


def count(x: float | None) -> Cell:
    """Operations, with the prefix that fits: "6.6 M", "110 G"."""
    if x is None:
        return Cell(MISSING)
    power = next((i for i in (4, 3, 2, 1) if abs(x) >= 1000**i), 0)
    return Cell(f"{x / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}".strip(), float(x))


def share(x: float | None, digits: int = 3) -> Cell:
    """0.052 as 5.2 %."""
    return Cell(MISSING) if x is None else Cell(f"{100 * x:.{digits}g} %", float(x))


def interval(x: Data | None, digits: int = 4) -> Cell:
    if not x:
        return Cell(MISSING)
    value, below = units.interval(x, digits).split(" ", 1)
    return Cell(value, float(x["value"]), below=below)


def shares(x: Data | None, digits: int = 3) -> Cell:
    """An interval of shares in percent: "95.2 % [94.8, 95.6]"."""
    if not x:
        return Cell(MISSING)
    value, low, high = (f"{100 * x[key]:.{digits}g}" for key in ("value", "low", "high"))
    return Cell(f"{value} %", float(x["value"]), below=f"[{low}, {high}]")


def times(x: Data | None) -> Cell:
    """An interval of a ratio of speeds: "1.31× [1.28, 1.34]"."""
    if not x:
        return Cell(MISSING)
    return Cell(f"{x['value']:.3g}×", float(x["value"]), below=f"[{x['low']:.3g}, {x['high']:.3g}]")


def brief(seconds: float | None) -> Cell:
    """A latency with three digits and the unit that fits: "412 µs", "12.3 ms", "1.52 s"."""
    if seconds is None:
        return Cell(MISSING)
    factor, unit = (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    scaled = seconds * factor
    return Cell(f"{scaled:,.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}", float(seconds))


def words(x: object, tone: str = "") -> Cell:
    """Anything else, as a person writes it: lists by commas, mappings as key value pairs, nothing as a dash."""
    return Cell(_plain(x) or MISSING, tone=tone)


def _plain(x: object) -> str:
    if x is None:
        return ""
    if isinstance(x, bool):
        return "yes" if x else "no"
    if isinstance(x, Mapping):
        return ", ".join(f"{key} {_plain(value)}" for key, value in x.items() if value not in (None, {}, [], ""))
    if isinstance(x, (list, tuple)):
        return ", ".join(_plain(item) for item in x)
    return f"{x:.6g}" if isinstance(x, float) else str(x)
