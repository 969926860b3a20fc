"""Zeros in a model's matrices, counted while the weights are streamed a few rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.efficiency.shapes import Matrix, Shapes
from lilliput.metrics.metric import Metric
from lilliput.model.stored import Model

PATTERNS = ((2, 4), (4, 8))  # n:m that hardware or kernels know, the tighter first
_CHUNK = 1 << 22  # weights looked at a time


@dataclass(frozen=True)
class Zeros:
    """Exact zeros of one matrix (all copies), and the n:m pattern along its inputs that all of it keeps, if any: at
    most n of each m neighbouring weights are not zero."""

    count: int
    pattern: tuple[int, int] | None


def count_zeros(model: Model, shapes: Shapes) -> Mapping[str, Zeros]:
    """The zeros of each matrix of the blocks, by tensor. Reads every weight of the blocks once; memory: a few rows.

    A pattern is reported only where zeros are as many as it asks for, so that a dense matrix shows none.
    """
    return {x.tensor: _count(model, x) for x in shapes.matrices if x.block is not None}


def _count(model: Model, matrix: Matrix) -> Zeros:
    total, open_ = 0, {p for p in PATTERNS if matrix.in_features % p[1] == 0}
    if matrix.copies > 1:  # experts in one tensor lie in either orientation: no pattern is claimed of them
        open_ = set()
    rows = model.shape(matrix.tensor)[0]
    across = matrix.weights // rows
    for start in range(0, rows, max(1, _CHUNK // across)):
        part = model.read_rows(matrix.tensor, start, min(rows, start + max(1, _CHUNK // across)))
        zero = part == 0
        total += int(zero.sum())
        open_ = {p for p in open_ if _keeps(zero, *p)}
    patterns = [p for p in PATTERNS if p in open_ and total * p[1] >= matrix.weights * (p[1] - p[0])]
    return Zeros(total, patterns[0] if patterns else None)


def _keeps(zero: Tensor, n: int, m: int) -> bool:
    """Whether at least m - n of each m neighbours in zero [rows, in] are set."""
    return bool((zero.reshape(-1, m).sum(dim=1, dtype=torch.int32) >= m - n).all())


METRIC = Metric(
    how="lilliput eval DIR",
    key="size.macs_saved, size.macs_saved_share",
    unit="multiplications per token",
    interval="none: counted exactly, where the recipe prunes",
)
