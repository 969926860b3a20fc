"""Figures of the methods on a real model, as they were measured: `measured.json`, written by benchmarks/figures.py."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

HEAD = (
    "| run | bits per weight | perplexity | ratio to the original [95 %] | KL, nats [95 %] | C4, ratio | PTB, ratio "
    "| time, forwards | peak RAM |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


@functools.cache
def figures() -> Mapping[str, Any]:
    """`protocol`, text, and `rows`, each with `name`, `run` (recipe and settings), `methods` (their names),
    `bits_per_weight`, `perplexity`, `ratio` and `kl` as [value, low, high], `c4` and `ptb` (ratios), `forwards` (wall
    time in bfloat16 forward passes of the calibration tokens) and `peak_bytes`."""
    data: Mapping[str, Any] = json.loads(
        resources.files("lilliput.methods").joinpath("measured.json").read_text("utf-8")
    )
    return data


def of(method: str) -> list[Mapping[str, Any]]:
    """The rows whose recipe has a step of this method."""
    return [row for row in figures()["rows"] if method in row["methods"]]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as lines of a Markdown table."""
    return [HEAD, *(_line(row) for row in rows)]


def _line(row: Mapping[str, Any]) -> str:
    cells = [
        f"`{row['run']}`",
        f"{row['bits_per_weight']:.3f}",
        _number(row["perplexity"]),
        _interval(row["ratio"]),
        _interval(row["kl"]),
        f"{row['c4']:.3f}",
        f"{row['ptb']:.3f}",
        "" if row["forwards"] is None else f"{row['forwards']:.1f}",
        f"{row['peak_bytes'] / 1e6:.0f} MB",
    ]
    return f"| {' | '.join(cells)} |"


def _interval(ends: Sequence[float]) -> str:
    value, low, high = (f"{x:.3f}" for x in ends)
    return f"{value} [{low}, {high}]"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"
