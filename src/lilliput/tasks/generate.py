"""Generate and match: the model answers in its own words, a pattern extracts the answer, and it must be equal.

Greedy decoding up to a stop string, end of text or the shape's number of tokens. Several patterns give several metrics,
as for GSM8K (Cobbe et al. 2021, arXiv:2110.14168): strict_match wants "#### N", flexible_extract takes the last number.
Before they are compared, answers lose surrounding space, letter case, commas, dollar signs and a full stop at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lilliput.errors import DataError
from lilliput.metrics.metric import Metric
from lilliput.tasks.decode import greedy
from lilliput.tasks.likelihood import Loaded
from lilliput.tasks.shapes import Row, Shape


@dataclass(frozen=True)
class Generate:
    """prompt; answer: what must come out; worked: the answer as a worked example shows it; pattern: a regular
    expression of this item, or empty for those of the shape."""

    prompt: str
    answer: str
    worked: str
    pattern: str = ""


def item(shape: Shape, row: Row, where: str) -> Generate:
    """A row as an item. Raises DataError, led by `where`, for an empty answer or a pattern that does not compile."""
    answer, pattern = shape.text(shape.answer, row), shape.text(shape.pattern, row)
    if not normal(answer):
        raise DataError(f"{where}: '{'target' if 'target' in shape.fields else 'answer'}' gives no answer to match.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise DataError(f"{where}: 'pattern' is not a regular expression: {error}.") from None
    return Generate(shape.text(shape.prompt, row), answer, shape.text(shape.shown, row), pattern)


def example(item: Generate) -> str:
    """The prompt with its answer, as a worked example."""
    delimiter = "" if item.prompt[-1:].isspace() else " "
    return f"{item.prompt}{delimiter}{item.worked}"


def text(item: Generate) -> str:
    """The item's text, as calibration data would hold it."""
    return example(item)


def prefixed(item: Generate, prefix: str) -> Generate:
    """The item after worked examples."""
    return replace(item, prompt=prefix + item.prompt)


def normal(answer: str) -> str:
    """The answer without what does not count."""
    return re.sub(r"[,$]", "", answer.strip().lower()).removesuffix(".").strip()


def extract(answer: str, pattern: str, take: str = "first") -> str | None:
    """The first or last match of a pattern, its first group that matched where it has groups; None for no match."""
    matches = list(re.finditer(pattern, answer))
    if not matches:
        return None
    match = matches[-1 if take == "last" else 0]
    return next((x for x in match.groups() if x), None) if match.re.groups else match.group()


def measure(
    loaded: Loaded, shape: Shape, items: Sequence[Generate], step: Callable[[int, int], None]
) -> dict[str, list[float]]:
    """For each metric of the shape 1 where the extracted answer is the right one, else 0."""
    answers = greedy(loaded, [x.prompt for x in items], stop=shape.stop, tokens=shape.tokens, step=step)
    rules: Mapping[str, Mapping[str, str]] = shape.patterns or {shape.metric: {}}
    scores: dict[str, list[float]] = {name: [] for name in rules}
    for x, answer in zip(items, answers, strict=True):
        for name, rule in rules.items():
            pattern = x.pattern or rule.get("pattern", "")
            extracted = extract(answer, pattern, rule.get("take", "first")) if pattern else answer
            scores[name].append(float(extracted is not None and normal(extracted) == normal(x.answer)))
    return scores


METRIC = Metric(
    how="lilliput eval DIR --against MODEL --tasks gsm8k=TEST.jsonl+TRAIN.jsonl,bbh:SUBSET=FILE.jsonl",
    key="tasks[].difference",
    unit="share of items",
    interval="score interval; paired, Bonett and Price",
    covers=(
        "reasoning-tasks",
        "bbh",
    ),
)
