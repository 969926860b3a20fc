"""LLM-Pruner: hidden channels and heads leave whose weights matter least to the loss, to first and second order.

With gradients g of the mean cross-entropy and F = mean over samples of the squared gradient of each one's loss (the
diagonal of the Fisher information), a weight's importance is |g w - w^2 F / 2| ("element"), or its first or second term
alone; "vector" adds g w up over a unit's row or column before the absolute value. A unit's score is the sum, the
largest, or the product of those of its coupled rows and columns. As in the paper the first and last blocks may stay
whole, but then blocks differ in width and no engine's config holds that: here every block loses the same.

Paper: Ma et al. 2023, arXiv 2305.11627.
Cost: one backward pass of `samples` samples. Limits: few samples, so scores are noisy; gradients are of text alike the
calibration text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.model.edited import heads_of
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Thinning, thinned
from lilliput.verbs.sampled import always, looked_at


class Options(Thinning):
    """See the module's docstring."""

    importance: Literal["element", "vector", "first", "second"] = Field("element", description="of a weight")
    group: Literal["sum", "max", "product", "last"] = Field(
        "sum", description="of a unit, from its coupled rows and columns; last: the columns of the consumer alone"
    )
    samples: int = Field(10, ge=1, description="calibration samples whose gradients are taken, at most")


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """The importance of every channel and head."""
    block = view.anatomy
    vectors: dict[tuple[str, str], Tensor] = {}

    def vector(name: str, axis: str) -> Tensor:
        if (name, axis) not in vectors:
            vectors[name, axis] = _importance(view, io, name, axis, o)
        return vectors[name, axis]

    scores: dict[str, tuple[float, ...]] = {}
    for m, mlp in enumerate(block.groups.channels):
        rows = [vector(name, "rows")[index] for name, index in mlp.rows]
        columns = [vector(name, "columns")[: mlp.width] for name in mlp.readers]
        scores[f"channels.{m}"] = tuple(_joined(rows, columns, o).tolist())
    heads = []
    for group in heads_of(block):
        rows = [vector(n, "rows")[a:b].sum()[None] for n, axis, (a, b) in group.members if axis == "rows"]
        columns = [vector(n, "columns")[a:b].sum()[None] for n, axis, (a, b) in group.members if axis == "columns"]
        heads.append(float(_joined(rows, columns, o)))
    if heads:
        scores["heads"] = tuple(heads)
    return scores


def _importance(view: EditView, io: EditIO, name: str, axis: str, o: Options) -> Tensor:
    """Of each row or column of a linear, float64."""
    weight, slope, square = view.weight(name).double(), io.gradients[name].double(), io.squares[name].double()
    across = 1 if axis == "rows" else 0
    first, second = weight * slope, 0.5 * weight.square() * square
    if o.importance == "vector":
        return first.sum(across).abs().cpu()
    value = {"element": first - second, "first": first, "second": second}[o.importance]
    return value.abs().sum(across).cpu()


def _joined(rows: Sequence[Tensor], columns: Sequence[Tensor], o: Options) -> Tensor:
    every = torch.stack([*columns] if o.group == "last" else [*rows, *columns])
    if o.group == "max":
        return every.amax(0)
    return every.prod(0) if o.group == "product" else every.sum(0)


METHOD = Edit(
    paper="Ma et al. 2023, arXiv 2305.11627",
    options=Options,
    needs=(),
    covers={
        "llm-pruner": [{"method": "llm-pruner"}, {"method": "refit"}],
    },
    sizes=thinned,
    score=score,
    gradients=always,
    looked_at=looked_at,
)
