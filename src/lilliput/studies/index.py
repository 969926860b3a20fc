"""The index of metrics and benchmarks: what `lilliput metrics` says, from the files that measure.

It lies in the room above all that measure, and finds their files by listing the folders; there is no list to extend.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lilliput.errors import DataError, nearest
from lilliput.metrics.metric import Metric

ROOMS = ("metrics", "tasks", "efficiency", "attribution", "report", "studies")


@dataclass(frozen=True)
class Listed:
    """A file that measures: its name, the room that it is in, what it says of itself, and its docstring in two."""

    name: str
    room: str
    metric: Metric
    summary: str
    text: str


@functools.cache
def discover() -> Mapping[str, Listed]:
    """All metrics and benchmarks by name. Raises RuntimeError for two of one name, or a METRIC that is none."""
    listed: dict[str, Listed] = {}
    for room in ROOMS:
        package = importlib.import_module(f"lilliput.{room}")
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"lilliput.{room}.{info.name}")
            if "METRIC" not in vars(module):
                continue
            name, metric = info.name.replace("_", "-"), vars(module)["METRIC"]
            if not isinstance(metric, Metric) or name in listed:
                raise RuntimeError(f"{module.__name__}: METRIC is no Metric, or another file is called '{name}'")
            summary, _, text = (module.__doc__ or "").strip().partition("\n")
            listed[name] = Listed(name, room, metric, summary, text.strip())
    return dict(sorted(listed.items()))


def index() -> list[dict[str, Any]]:
    """One entry for each metric and benchmark, as plain data, sorted by name."""
    return [entry(x) for x in discover().values()]


def entry(listed: Listed) -> dict[str, Any]:
    """A metric's entry of the index."""
    own = {key: list(x) if isinstance(x, tuple) else x for key, x in vars(listed.metric).items()}
    return {"name": listed.name, "room": listed.room, "summary": listed.summary, **own}


def find(name: str) -> list[Listed]:
    """The metric of that name, or all that cover this id of the literature. Raises DataError with the nearest name."""
    identifier, metrics = name.replace("_", "-"), discover()
    if identifier in metrics:
        return [metrics[identifier]]
    matches = [x for x in metrics.values() if identifier in x.metric.covers]
    if not matches:
        ids = {key for x in metrics.values() for key in x.metric.covers}
        raise DataError(f"unknown metric, benchmark or catalogue id '{name}'.{nearest(identifier, {*metrics, *ids})}")
    return matches


def page(listed: Listed) -> str:
    """A metric's page in Markdown: its docstring, how to run it, and the ids that it covers."""
    metric = listed.metric
    lines = [f"# {listed.name}", "", listed.summary, ""]
    lines += ["```text", listed.text, "```", ""] if listed.text else []
    lines += [
        f"- run: `{metric.how}`",
        f"- in its JSON: {', '.join(f'`{x.strip()}`' for x in metric.key.split(','))}",
        f"- unit: {metric.unit}",
        f"- interval: {metric.interval}",
    ]
    lines += [f"- paper: {metric.paper}"] if metric.paper else []
    lines += [f"- covers: {', '.join(f'`{x}`' for x in metric.covers)}"] if metric.covers else []
    return "\n".join(lines) + "\n"
