"""The section of the page about training: how the loss went, on what text, and what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.report import cells, figures, sections
from lilliput.report.blocks import Block, Section
from lilliput.report.cells import table, words
from lilliput.report.svg import Picture

Data = Mapping[str, Any]
POINTS = 60  # of a drawn curve; each stands for as many steps as it takes


def training(evidence: Data) -> Section | None:
    """A curve for each training step, and what it was trained with."""
    rows = evidence.get("training") or ()
    if not rows:
        return None
    lines = [
        (
            words(f"{n}. {x.get('method')}"),
            words(x.get("objective")),
            cells.number(x.get("steps")),
            words(f"{x['data']['samples']} x {x['data']['tokens']} tokens of {x['data']['source']}"),
            cells.number(x["losses"][0] if x["losses"] else None, 4),
            cells.number(_last(x["losses"]), 4),
            cells.number(x.get("seconds"), 3),
        )
        for n, x in enumerate(rows, 1)
    ]
    names = ("training", "objective", "steps", "text", "first loss", "last losses", "seconds")
    blocks: list[Block] = [table(names, lines, "The last losses are a mean over a tenth of the steps.")]
    for n, x in enumerate(rows, 1):
        blocks += _curve(f"training-{n}", f"{n}. {x.get('method')}", x)
    stopped = [str(x["stopped"]) for x in rows if x.get("stopped")]
    lead = f"Trained on the finished model{', stopped ' + '; '.join(stopped) if stopped else ''}."
    return Section("training", "Training", blocks, lead)


def _curve(key: str, name: str, row: Data) -> list[Block]:
    points = binned(row["losses"])
    if len(points) < 2:
        return []
    data = table(
        ("step", "mean loss", "least", "most"),
        [tuple(cells.number(v, 4) for v in point) for point in points],
    )
    caption = f"Loss of {name} by step; the band is from the least to the most of the steps that a point stands for."
    drawings = figures.curve(key, points, "step", "loss")
    return [Picture(*drawings, sections.label(caption, data), caption, data)]


def binned(losses: Sequence[float]) -> list[tuple[float, float, float, float]]:
    """At most POINTS of (step from 1, mean, least, most)."""
    each = max(1, -(-len(losses) // POINTS))
    out = []
    for a in range(0, len(losses), each):
        some = losses[a : a + each]
        out.append((a + (len(some) + 1) / 2, sum(some) / len(some), min(some), max(some)))
    return out


def _last(losses: Sequence[float]) -> float | None:
    some = losses[-max(1, len(losses) // 10) :]
    return sum(some) / len(some) if some else None
