"""Models of several sizes and bit widths on one picture: loss or accuracy against the bits of the whole model.

At a fixed number of bits, is a larger model with fewer bits a weight better than a smaller one with more? One line
joins the sizes of a bit width, and the front joins the models that no other beats at as few bits. Mostly, 4 bits are
best (Dettmers and Zettlemoyer 2023, "The case for 4-bit precision: k-bit inference scaling laws", arXiv:2212.09720).

Loss is the mean negative log-likelihood, nats per token, of one text; models must cut it into the same tokens, so they
are of one family. Accuracy is the mean over the tasks that all were scored on, each counting once. Bits are those of
the weight files; a model's bit width is what its recipe asks for, else its bits per weight rounded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.errors import DataError
from lilliput.metrics.metric import Metric
from lilliput.report import cells, figures
from lilliput.report.blocks import Block, Section
from lilliput.report.cells import Table, table, words
from lilliput.report.compare import best, common, names
from lilliput.report.figures import Point
from lilliput.report.page import page
from lilliput.report.sections import label
from lilliput.report.svg import Picture, require

Data = Mapping[str, Any]


def scaling_rows(evidences: Sequence[Data]) -> list[dict[str, Any]]:
    """One row for each model, in the given order.

    Keys: name, model, bits (of a weight, whole), total_bits (of the weight files), parameters, data (name of the text),
    loss and accuracy ({value, low, high}; accuracy None where no task is common to all), best_loss, best_accuracy:
    whether no other model with at most as many bits is at least as good, one of both strictly. Values count, not
    intervals.

    Raises DataError for fewer than two models, one whose size was not measured, or no text in common.
    """
    if len(evidences) < 2:
        raise DataError(f"{len(evidences)} model shows no scaling: give several sizes, each with several bit widths.")
    tasks = _tasks(evidences)
    rows = [_row(x, common(evidences, x), tasks) for x in evidences]
    for name, row in zip(names(rows), rows, strict=True):
        row["name"] = name
    bits = [(row["total_bits"], row["total_bits"]) for row in rows]
    losses = [row["loss"]["value"] for row in rows]
    missed = [None if row["accuracy"] is None else -row["accuracy"]["value"] for row in rows]
    for i, row in enumerate(rows):
        row["best_loss"], row["best_accuracy"] = best(i, bits, losses), best(i, bits, missed)
    return rows


def _row(evidence: Data, data: Data, tasks: Sequence[str]) -> dict[str, Any]:
    size, model = evidence.get("size") or {}, str(evidence.get("model") or "")
    if not size.get("bytes") or not data.get("perplexity"):
        raise DataError(f"{model}: its size or its perplexity was not measured: run `lilliput eval {model} --json`.")
    return {
        "name": "",
        "model": model,
        "bits": _bits(evidence),
        "total_bits": 8 * int(size["bytes"]),
        "parameters": size.get("parameters"),
        "data": data.get("name"),
        "loss": {key: math.log(x) for key, x in data["perplexity"].items()},
        "accuracy": _accuracy(evidence, tasks),
    }


def _bits(evidence: Data) -> int:
    """The bit width that a model stands for."""
    steps = (evidence.get("recipe") or {}).get("steps") or ()
    widths = [(x.get("target") or {}).get("bits") for x in steps]
    numbers = [int(x) for x in widths if x is not None]
    return numbers[-1] if numbers else round(evidence["size"].get("bits_per_weight") or 0.0)


def _key(row: Data) -> str:
    return str(row.get("fingerprint") or row["name"])


def _tasks(evidences: Sequence[Data]) -> list[str]:
    """The tasks that all models were scored on, by fingerprint."""
    every = [{_key(row) for row in x.get("tasks") or () if row.get("ours")} for x in evidences]
    return sorted(set.intersection(*every))


def _accuracy(evidence: Data, tasks: Sequence[str]) -> dict[str, float] | None:
    """Mean of the tasks' scores; their errors are taken as independent."""
    scores = [row["ours"] for row in evidence.get("tasks") or () if _key(row) in tasks]
    if not scores:
        return None
    mean = sum(x["value"] for x in scores) / len(scores)
    half = math.hypot(*((x["high"] - x["low"]) / 2 for x in scores)) / len(scores)
    return {"value": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def headline(rows: Sequence[Data]) -> str:
    """Whose models make the front, in a sentence."""
    front = [row for row in rows if row["best_loss"]]
    counts = Counter(int(row["bits"]) for row in front)
    parts = [f"{n} of {bits} bits" for bits, n in sorted(counts.items(), key=lambda x: (-x[1], x[0]))]
    return f"{len(front)} of {len(rows)} models are not beaten by any with as few bits: {', '.join(parts)}."


def scaling_table(rows: Sequence[Data]) -> Table:
    """All rows, for the page and the terminal."""
    columns = ("model", "bits of a weight", "bits of the model", "parameters", "loss, nats per token", "accuracy")
    lines = [
        (
            words(row["name"]),
            cells.number(row["bits"]),
            cells.count(row["total_bits"]),
            cells.count(row["parameters"]),
            cells.interval(row["loss"]),
            cells.shares(row["accuracy"]),
            words(", ".join(f"★\N{NO-BREAK SPACE}{x}" for x in ("loss", "accuracy") if row[f"best_{x}"])),
        )
        for row in sorted(rows, key=lambda row: (-row["bits"], row["total_bits"]))
    ]
    note = "★ Front: none with at most as many bits is as good or better."
    return table((*columns, "front"), lines, sortable=True, note=note)


def _picture(rows: Sequence[Data], key: str, y_axis: str, caption: str) -> Picture | None:
    measured = [row for row in rows if row[key] is not None]
    if len(measured) < 2:
        return None
    lines: dict[str, list[Point]] = {}
    for row in sorted(measured, key=lambda row: (-row["bits"], row["total_bits"])):
        x, y = float(row["total_bits"]), row[key]
        point = Point(str(row["name"]), x, x, x, y["value"], y["low"], y["high"], bool(row[f"best_{key}"]))
        lines.setdefault(f"{row['bits']} bits", []).append(point)
    drawings = figures.scaling(f"scaling-{key}", lines, "bits of the whole model", y_axis, upwards=key == "accuracy")
    data = scaling_table(measured)
    legend = tuple(zip(figures.shades(len(lines)), lines, strict=True))
    return Picture(*drawings, label(caption, data), caption, data, legend)


def render_scaling(evidences: Sequence[Data]) -> str:
    """The picture as one self-contained page, as `lilliput.report.page.render` makes them.

    Raises DataError as `scaling_rows` does, LilliputError where matplotlib or jinja2 is not installed.
    """
    require()
    rows = scaling_rows(evidences)
    blocks = (
        _picture(rows, "loss", "loss, nats per token", "Loss against bits: down and left is better."),
        _picture(rows, "accuracy", "mean accuracy", "Accuracy against bits: up and left is better."),
    )
    plots: list[Block] = [x for x in blocks if x is not None]
    lead = "A line joins the sizes of one bit width. Filled and joined in grey: none of as few bits is better."
    return page(
        "compare.html.j2",
        title=f"{len(rows)} models by bits",
        about=f"Loss on {rows[0]['data']}.",
        sections=[Section("scaling", "Scaling", plots, lead), Section("models", "Models", [scaling_table(rows)])],
        headline=headline(rows),
        level="unsure",
    )


METRIC = Metric(
    how="lilliput compare --scaling SMALL-W8 SMALL-W4 LARGE-W8.json LARGE-W4.json --html FILE",
    key="models[].loss, models[].accuracy, models[].best_loss, models[].best_accuracy",
    unit="nats per token; share of items",
    interval="Student's t over windows; of tasks, those of their scores",
    covers=("kbit-scaling", "scaling-law"),
    paper="Dettmers and Zettlemoyer 2023, arXiv:2212.09720",
)
