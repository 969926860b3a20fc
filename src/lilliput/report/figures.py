"""The few kinds of drawings that the pages use. Each takes plain numbers and gives the SVG of both widths."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lilliput.report.cells import count
from lilliput.report.svg import COLOUR, HEATS, Canvas, clean, draw, tip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Data = Mapping[str, Any]
Drawn = tuple[str, str]
_LABEL = 30  # characters of a row's name beside its bar
_PLAIN = {"facecolor": COLOUR["surface"], "edgecolor": "none", "pad": 1.0}  # behind words that lines may cross


@dataclass(frozen=True)
class Row:
    """A line of a forest plot: its name, value with interval, the text at its end, and a colour token."""

    name: str
    value: float
    low: float
    high: float
    text: str
    colour: str = "ours"


@dataclass(frozen=True)
class Point:
    """A point of a Pareto plot, with intervals along x (left, right) and y (low, high); `best`: no other is better in
    both."""

    name: str
    x: float
    left: float
    right: float
    y: float
    low: float
    high: float
    best: bool


def bars(
    name: str, rows: Sequence[tuple[str, Sequence[tuple[float, str, str]]]], reference: float | None = None
) -> Drawn:
    """Horizontal bars in groups: (row name, [(length, text, colour token), ...]). Lengths share one scale from 0;
    `reference` is marked by a line."""
    each = max((len(group) for _, group in rows), default=1)
    longest = max((length for _, group in rows for length, _, _ in group), default=1.0) or 1.0

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        step = 1.0 / (each + 0.8)
        for i, (_, group) in enumerate(rows):
            for j, (length, text, colour) in enumerate(group):
                y = i + (j - (len(group) - 1) / 2) * step
                axes.barh(y, length, height=step * 0.82, color=COLOUR[colour])
                axes.text(length + longest * 0.015, y, clean(text), va="center", size=11, bbox=_PLAIN)
        if reference is not None:
            axes.axvline(reference, color=COLOUR["muted"], linewidth=1, zorder=2.5)
        _names(canvas, [label for label, _ in rows])
        axes.set_xlim(0, longest * (1.35 if canvas.narrow else 1.18))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)

    row = 18 * each + 12
    return draw(name, paint, (len(rows) * row + 12, len(rows) * (row + 20) + 12))


def forest(name: str, rows: Sequence[Row], axis: str, reference: float | None) -> Drawn:
    """Values with their intervals, one line each, against the reference that means no difference."""

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        for i, row in enumerate(rows):
            colour = COLOUR[row.colour]
            axes.plot([row.low, row.high], [i, i], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot([row.value], [i], marker="o", markersize=8, color=colour, linestyle="none")
        if reference is not None:
            axes.axvline(reference, color=COLOUR["muted"], linewidth=1)
        _names(canvas, [row.name for row in rows])
        _widen(axes, [x for row in rows for x in (row.low, row.high)] + ([] if reference is None else [reference]))
        for i, row in enumerate(rows):
            _note(canvas, i, row.text)
        _scale(axes, axis, canvas.narrow)

    return draw(name, paint, (len(rows) * 30 + 58, len(rows) * 48 + 58))


def curve(name: str, points: Sequence[tuple[float, float, float, float]], x_axis: str, y_axis: str) -> Drawn:
    """A line through (x, value, low, high) with its band of intervals; y starts at 0."""

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        xs = [p[0] for p in points]
        axes.fill_between(xs, [p[2] for p in points], [p[3] for p in points], color=COLOUR["ours"], alpha=0.2, lw=0)
        axes.plot(xs, [p[1] for p in points], color=COLOUR["ours"], linewidth=2, marker="o", markersize=5)
        axes.set_ylim(0, max(p[3] for p in points) * 1.08 or 1)
        axes.grid(axis="y")
        axes.set_ylabel(y_axis, size=11)
        _scale(axes, x_axis, canvas.narrow)
        axes.tick_params(axis="y", labelsize=11, labelcolor=COLOUR["muted"])

    return draw(name, paint, (250, 220))


def columns(name: str, values: Sequence[tuple[int, float, str]], y_axis: str, shares: bool) -> Drawn:
    """One upright bar per block: (block, value, tooltip). The largest is emphasised. shares: the axis is in percent."""
    most = max((value for _, value, _ in values), default=0.0)

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        for block, value, text in values:
            colour = COLOUR["loss"] if value == most and most > 0 else COLOUR["ours"]
            axes.bar(block, value, width=0.8, color=colour, gid=tip(clean(text)))
        axes.set_ylim(min(0.0, *(v for _, v, _ in values)), most * 1.08 or 1)
        axes.grid(axis="y")
        axes.set_ylabel(y_axis, size=11)
        if shares:
            axes.yaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g} %")
        _scale(axes, "block", canvas.narrow, whole=True)
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="y", labelsize=11, labelcolor=COLOUR["muted"])

    return draw(name, paint, (220, 200))


def heat(name: str, cells: Mapping[tuple[int, str], tuple[float, str, bool]], roles: Sequence[str]) -> Drawn:
    """Blocks by roles: {(block, role): (value, tooltip, marked)}. Blocks run to the right, on a phone downwards."""
    blocks = sorted({block for block, _ in cells})
    most = max((value for value, _, _ in cells.values()), default=0.0)

    def paint(canvas: Canvas) -> None:
        from matplotlib.patches import Rectangle

        axes = canvas.axes
        for (block, role), (value, text, marked) in cells.items():
            i, j = blocks.index(block), roles.index(role)
            x, y = (j, i) if canvas.narrow else (i, j)
            level = min(HEATS - 1, int(HEATS * max(value, 0.0) / most)) if most > 0 else 0
            colour = COLOUR[f"heat{level}"]
            axes.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, color=colour, lw=0, gid=tip(clean(text))))
            if marked:
                axes.plot([x], [y], marker="o", markersize=7, color=COLOUR["surface"], markeredgecolor=COLOUR["ink"])
        names = [_short(clean(role), 14) for role in roles]
        every = math.ceil(len(blocks) / 40)
        ticks = list(range(0, len(blocks), every))
        numbers = [str(blocks[i]) for i in ticks]
        if canvas.narrow:
            axes.set_xticks(range(len(roles)), names, rotation=90)
            axes.set_yticks(ticks, numbers)
            axes.xaxis.tick_top()
        else:
            axes.set_yticks(range(len(roles)), names)
            axes.set_xticks(ticks, numbers)
            axes.set_xlabel("block", size=11)
        axes.set_xlim(-0.6, (len(roles) if canvas.narrow else len(blocks)) - 0.4)
        axes.set_ylim((len(blocks) if canvas.narrow else len(roles)) - 0.4, -0.6)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(labelsize=10, labelcolor=COLOUR["ink"])

    tall = max(14.0, min(20.0, 900 / max(len(blocks), 1)))
    return draw(name, paint, (len(roles) * 24 + 56, len(blocks) * tall + 90))


def pareto(name: str, points: Sequence[Point], x_axis: str, y_axis: str, upwards: bool) -> Drawn:
    """Models by cost and loss; the best are filled and joined by a staircase. upwards: a larger x is better."""

    def paint(canvas: Canvas) -> None:
        from matplotlib.ticker import LogLocator

        axes = canvas.axes
        front = sorted((p for p in points if p.best), key=lambda p: p.x)
        if len(front) > 1:
            where: Literal["pre", "post"] = "pre" if upwards else "post"
            axes.step([p.x for p in front], [p.y for p in front], where=where, color=COLOUR["grid"], lw=2)
        for p in points:
            colour = COLOUR["ours" if p.best else "muted"]
            axes.plot([p.x, p.x], [p.low, p.high], color=colour, linewidth=1.5)
            axes.plot([p.left, p.right], [p.y, p.y], color=colour, linewidth=1.5)
            axes.plot([p.x], [p.y], marker="o", markersize=9, color=colour, markerfacecolor=_fill(p), mew=2)
        axes.margins(x=0.12, y=0.12)
        if all(p.y > 0 for p in points) and max(p.y for p in points) > 20 * min(p.y for p in points):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            axes.minorticks_off()
        axes.grid(axis="y")
        axes.set_ylabel(y_axis, size=11)
        _scale(axes, x_axis, canvas.narrow)
        axes.tick_params(axis="y", labelsize=11, labelcolor=COLOUR["muted"])
        _name_points(axes, points, 18 if canvas.narrow else _LABEL)

    return draw(name, paint, (360, 320))


def shades(count: int) -> list[str]:
    """Colour tokens of an ordered number of lines, the first the strongest."""
    return [f"heat{HEATS - 1 - round(i * (HEATS - 3) / max(1, count - 1))}" for i in range(count)]


def scaling(name: str, lines: Mapping[str, Sequence[Point]], x_axis: str, y_axis: str, upwards: bool) -> Drawn:
    """Points of one kind joined in the given order, each line named at its end; x is logarithmic. The best of all are
    filled and joined by a staircase. upwards: a larger y is better."""

    def paint(canvas: Canvas) -> None:
        from matplotlib.ticker import LogLocator

        axes = canvas.axes
        axes.set_xscale("log")
        front = sorted((p for line in lines.values() for p in line if p.best), key=lambda p: p.x)
        axes.step([p.x for p in front], [p.y for p in front], where="post", color=COLOUR["grid"], lw=4)
        for shade, (label, line) in zip(shades(len(lines)), lines.items(), strict=True):
            colour = COLOUR[shade]
            axes.plot([p.x for p in line], [p.y for p in line], color=colour, linewidth=1.5)
            for p in line:
                axes.plot([p.x, p.x], [p.low, p.high], color=colour, linewidth=1)
                fill = colour if p.best else COLOUR["surface"]
                marker = axes.plot([p.x], [p.y], marker="o", markersize=8, color=colour, markerfacecolor=fill, mew=2)
                marker[0].set_gid(tip(clean(f"{p.name}, {label}")))
            end = line[-1] if upwards else line[0]
            place: dict[str, Any] = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
            axes.annotate(label, (end.x, end.y), size=11, bbox=_PLAIN, **place)
        axes.margins(x=0.08, y=0.14)
        axes.grid(axis="y")
        axes.set_ylabel(y_axis, size=11)
        _scale(axes, x_axis, canvas.narrow)
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if canvas.narrow else (1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda x, _: count(x).text)
        axes.minorticks_off()
        axes.tick_params(axis="y", labelsize=11, labelcolor=COLOUR["muted"])

    return draw(name, paint, (380, 340))


def _fill(point: Point) -> str:
    return COLOUR["ours" if point.best else "surface"]


def _short(text: str, most: int) -> str:
    """The text, or its beginning and its end."""
    return text if len(text) <= most else f"{text[: most * 2 // 3 - 1]}…{text[len(text) - most // 3 :]}"


def _lines(text: str) -> str:
    """The text in at most two lines."""
    if len(text) <= _LABEL:
        return text
    lines = textwrap.wrap(text, _LABEL)
    return _short(lines[0], _LABEL) + "\n" + _short(" ".join(lines[1:]), _LABEL)


def _names(canvas: Canvas, labels: Sequence[str]) -> None:
    """Names of rows: beside them, or above them where the drawing is narrow. The first row is at the top."""
    axes = canvas.axes
    axes.set_ylim(len(labels) - 0.45, -0.8 if canvas.narrow else -0.55)
    if canvas.narrow:
        axes.set_yticks([])
        for i, label in enumerate(labels):
            where: dict[str, Any] = {
                "transform": axes.get_yaxis_transform(),
                "va": "center",
                "size": 12,
                "bbox": _PLAIN,
            }
            axes.text(0, i - 0.45, _short(clean(label), 44), **where)
    else:
        axes.set_yticks(range(len(labels)), [_lines(clean(label)) for label in labels])


def _note(canvas: Canvas, row: int, text: str) -> None:
    """The figures of a row in words, at the right end of its line, or of its name's line."""
    y = row - 0.45 if canvas.narrow else row
    where: dict[str, Any] = {"transform": canvas.axes.get_yaxis_transform(), "va": "center", "size": 11}
    if canvas.narrow:
        canvas.axes.text(1, y, clean(text), ha="right", color=COLOUR["muted"], bbox=_PLAIN, **where)
    else:
        canvas.axes.text(1.02, y, clean(text), ha="left", **where)


def _widen(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    axes.set_xlim(low - room, high + room)


def _name_points(axes: Axes, points: Sequence[Point], longest: int) -> None:
    unit = axes.figure.dpi / 72
    spots = [tuple(axes.transData.transform((p.x, p.y)) / unit) for p in points]
    texts = [_short(clean(p.name), longest) for p in points]
    middle = axes.transAxes.transform((0.5, 0.5))[0] / unit
    order = sorted(range(len(points)), key=lambda n: not points[n].best)
    for n, (dx, dy) in label_offsets(spots, [6.4 * len(text) for text in texts], order, middle).items():
        axes.annotate(
            texts[n],
            (points[n].x, points[n].y),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="left" if dx > 0 else "right",
            size=11,
            weight="bold" if points[n].best else "normal",
        )


def label_offsets(
    spots: Sequence[tuple[float, ...]], widths: Sequence[float], order: Sequence[int], middle: float
) -> dict[int, tuple[int, int]]:
    """Where names of such widths go beside their points, as offsets: in turn by `order`, each where it covers the
    fewest names and comes near the fewest other points. All in points of print; left of its point is a name that ends
    there (a negative offset)."""
    # What stands right above or below a point seems to be its name.
    occupied = {("point", n): (x - 8, y - 18, x + 8, y + 20) for n, (x, y) in enumerate(spots)}
    places: dict[int, tuple[int, int]] = {}
    for n in order:
        x, y = spots[n]
        sides = (-9, 9) if x > middle else (9, -9)
        boxes = {
            (dx, dy): (
                x + dx - (0 if dx > 0 else widths[n]),
                y + dy,
                x + dx + (widths[n] if dx > 0 else 0),
                y + dy + 11,
            )
            for dy in (7, -16, 21, -30)
            for dx in sides
        }
        others = [box for key, box in occupied.items() if key != ("point", n)]
        crossed = {
            place: sum(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in others)
            for place, a in boxes.items()
        }
        places[n] = min(boxes, key=lambda place, crossed=crossed: crossed[place])  # type: ignore[misc]
        occupied["name", n] = boxes[places[n]]
    return places


def _scale(axes: Axes, label: str, narrow: bool, whole: bool = False) -> None:
    """The x axis: few ticks, light lines, its name."""
    from matplotlib.ticker import MaxNLocator

    axes.grid(axis="x")
    axes.set_xlabel(label, size=11)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4 if narrow else 8, integer=whole, steps=[1, 2, 5, 10]))
