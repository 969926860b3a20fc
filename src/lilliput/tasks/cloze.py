"""Cloze: whether greedy decoding gives the missing end of a text, and how likely the model finds it.

LAMBADA (Paperno et al. 2016, arXiv:1606.06031). Perplexity is that of the whole target, not of its tokens: the exponent
of the mean negative log-likelihood, as EleutherAI's lm-evaluation-harness defines it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lilliput.errors import DataError
from lilliput.metrics.metric import Metric
from lilliput.tasks.likelihood import Loaded, log_likelihoods
from lilliput.tasks.shapes import Row, Shape


@dataclass(frozen=True)
class Cloze:
    """context, and the target with the delimiter before it."""

    context: str
    target: str


def item(shape: Shape, row: Row, where: str) -> Cloze:
    """A row as an item. Raises DataError, led by `where`, for an empty target."""
    target = shape.text(shape.target, row)
    if not target.strip():
        raise DataError(f"{where}: '{'target' if 'target' in shape.fields else 'text'}' leaves no target.")
    return Cloze(shape.text(shape.context, row), shape.text(shape.delimiter, row) + target)


def example(item: Cloze) -> str:
    """The whole text, as a worked example."""
    return item.context + item.target


def text(item: Cloze) -> str:
    """The item's text, as calibration data would hold it."""
    return example(item)


def prefixed(item: Cloze, prefix: str) -> Cloze:
    """The item after worked examples."""
    return replace(item, context=prefix + item.context)


def measure(
    loaded: Loaded, shape: Shape, items: Sequence[Cloze], step: Callable[[int, int], None]
) -> dict[str, list[float]]:
    """acc of each item (1 where every token of the target is the model's first choice) and log_likelihood (nats)."""
    scores = log_likelihoods(loaded, [(x.context, x.target) for x in items], step=step)
    return {"acc": [float(x.greedy) for x in scores], "log_likelihood": [x.value for x in scores]}


METRIC = Metric(
    how="lilliput eval DIR --against MODEL --tasks lambada=FILE.jsonl",
    key="tasks[].difference, tasks[].also",
    unit="share of items; perplexity of the target",
    interval="score interval; paired, Bonett and Price",
    covers=("zero-shot-tasks",),
    paper="Paperno et al. 2016, arXiv:1606.06031",
)
