"""Multiple choice: the continuation that the model finds likeliest.

acc takes the choice of the largest log-likelihood, acc_norm that of the largest log-likelihood for each character of
the choice (without the delimiter), ties to the first: the definitions of EleutherAI's lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lilliput.errors import DataError
from lilliput.metrics.metric import Metric
from lilliput.tasks.likelihood import Loaded, log_likelihoods
from lilliput.tasks.shapes import Row, Shape


@dataclass(frozen=True)
class Choice:
    """contexts, continuations: one for each choice; lengths: of the choices in characters; label: the right one."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]
    label: int


def item(shape: Shape, row: Row, where: str) -> Choice:
    """A row as an item. Raises DataError, led by `where`, for fewer than two or empty choices, or a label outside."""
    if shape.contexts:
        contexts = tuple(shape.value(shape.contexts, row))
        choices = (shape.text(shape.target, row),) * len(contexts)
    else:
        choices = tuple(shape.value(shape.choices, row))
        contexts = (shape.text(shape.context, row),) * len(choices)
    fields = ", ".join(f"'{x}'" for x in shape.fields)
    if len(choices) < 2 or not all(x.strip() for x in choices):
        raise DataError(f"{where}: fewer than two choices, or an empty one, from the fields {fields}.")
    label = shape.value(shape.label, row)
    if label is None or not 0 <= int(label) < len(choices):
        name = "answer" if "answer" in shape.fields else "label"
        raise DataError(f"{where}: '{name}' is {row.get(name)!r}, which is none of the {len(choices)} choices.")
    delimiter = shape.text(shape.delimiter, row)
    return Choice(contexts, tuple(delimiter + x for x in choices), tuple(map(len, choices)), int(label))


def example(item: Choice) -> str:
    """The item with its right answer, as a worked example."""
    return item.contexts[item.label] + item.continuations[item.label]


def text(item: Choice) -> str:
    """The item's text, as calibration data would hold it."""
    return example(item)


def prefixed(item: Choice, prefix: str) -> Choice:
    """The item after worked examples."""
    return replace(item, contexts=tuple(prefix + x for x in item.contexts))


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))


def measure(
    loaded: Loaded, shape: Shape, items: Sequence[Choice], step: Callable[[int, int], None]
) -> dict[str, list[float]]:
    """acc and acc_norm of each item, 0 or 1."""
    requests = [pair for x in items for pair in zip(x.contexts, x.continuations, strict=True)]
    scores = iter(log_likelihoods(loaded, requests, step=step))
    metrics: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for x in items:
        sums = [next(scores).value for _ in x.continuations]
        shares = [value / length for value, length in zip(sums, x.lengths, strict=True)]
        metrics["acc"].append(float(_first_largest(sums) == x.label))
        metrics["acc_norm"].append(float(_first_largest(shares) == x.label))
    return metrics


METRIC = Metric(
    how="lilliput eval DIR --against MODEL --tasks piqa=FILE.jsonl,openbookqa=FILE.jsonl,commonsenseqa=FILE.jsonl",
    key="tasks[].difference",
    unit="share of items",
    interval="score interval; paired, Bonett and Price",
    covers=(
        "zero-shot-tasks",
        "reasoning-tasks",
    ),
)
