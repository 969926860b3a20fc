"""Scales of groups of weights on a table of levels: those that cover, and those of least weighted error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.algebra.ranges import stored
from lilliput.formats import groups
from lilliput.formats.tables import Table

CHUNK = 1 << 18  # weights worked on at a time: a few float32 buffers of this size stay in the second-level caches
_STRIDE = 3


@dataclass(frozen=True)
class Weighed:
    """A weight [rows, width], float32, in groups of `size` inputs, and what its errors cost.

    `importance`: [1 or rows, width] or None; the error of a group is the sum of importance * |error|^norm.
    """

    weight: Tensor
    size: int
    importance: Tensor | None
    norm: float = 2.0

    @property
    def units(self) -> tuple[int, int]:
        rows, width = self.weight.shape
        return groups.units(rows, width, self.size)

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        """Rows and groups, with their weights and importance [rows, groups, size], a chunk at a time."""
        rows, width = self.weight.shape
        if self.size == 0:
            one = None if self.importance is None else self.importance.expand(rows, width).reshape(1, 1, -1)
            yield slice(0, 1), slice(0, 1), self.weight.reshape(1, 1, -1), one
            return
        step = max(1, CHUNK // max(width, 1))
        for columns, some, size in groups.pieces(width, self.size):
            for a in range(0, rows, step):
                part = slice(a, min(a + step, rows))
                weights = None
                if self.importance is not None:
                    own = self.importance if self.importance.shape[0] == 1 else self.importance[part]
                    weights = groups.split(own[:, columns], size)
                yield part, some, groups.split(self.weight[part, columns], size), weights

    def cost(self, miss: Tensor, importance: Tensor | None) -> Tensor:
        """Errors [rows, groups, size], overwritten, to one number a group."""
        if self.norm == 2.0:
            miss.mul_(miss)
        else:
            miss.abs_().pow_(self.norm)
        if importance is not None:
            miss.mul_(importance)
        return miss.sum(-1)


def cover(weighed: Weighed, table: Table) -> Tensor:
    """Peaks [rows, groups]: the least scale whose levels reach all weights of a group, times the largest level."""
    peak = weighed.weight.new_empty(weighed.units)
    slope = float(table.levels[-1]) / float(table.levels[0])
    for rows, some, w, _ in weighed.blocks():
        peak[rows, some] = torch.maximum(w.amax(-1), w.amin(-1).mul_(slope)).clamp_(min=0.0)
    return peak


def error(weighed: Weighed, table: Table, scale: Tensor) -> Tensor:
    """What each group loses at scales float32 [rows, groups], in the same shape."""
    loss = torch.empty_like(scale)
    for rows, some, w, importance in weighed.blocks():
        loss[rows, some] = _loss(weighed, table, w, importance, scale[rows, some])
    return loss


def shrink(weighed: Weighed, table: Table, peak: Tensor, dtype: torch.dtype, steps: int, shortest: float) -> Tensor:
    """Scales [rows, groups], float32 that `dtype` holds, of least error among shares of the peaks from `shortest` to 1,
    and their least-squares values. Every third of `steps` shares is tried and then the best one's neighbours; never
    worse than the peaks themselves.
    """
    best = stored(peak / table.top, dtype)
    unit = (1.0 - shortest) / max(steps - 1, 1)
    for rows, some, w, importance in weighed.blocks():
        wide = chosen = best[rows, some]
        least = _loss(weighed, table, w, importance, chosen)
        at = torch.zeros_like(least)

        def take(trial: Tensor) -> Tensor:
            nonlocal chosen, least
            loss = _loss(weighed, table, w, importance, trial)  # noqa: B023 - called within the round
            better = loss < least
            chosen, least = torch.where(better, trial, chosen), torch.where(better, loss, least)
            return better

        for i in range(_STRIDE, steps, _STRIDE):
            at = torch.where(take(stored(wide * (1.0 - unit * i), dtype)), float(i), at)
        for move in (-1.0, 1.0):
            take(stored(wide * (1.0 - unit * (at + move).clamp_(0.0, steps - 1.0)), dtype))
        for _ in range(2):
            take(stored(_refit(table, w, importance, chosen), dtype))
        best[rows, some] = chosen
    return best


def _levels(table: Table, w: Tensor, scale: Tensor) -> Tensor:
    value = w * scale.reciprocal().unsqueeze(-1)
    table.snap(value)
    return value


def _loss(weighed: Weighed, table: Table, w: Tensor, importance: Tensor | None, scale: Tensor) -> Tensor:
    miss = _levels(table, w, scale).mul_(scale.unsqueeze(-1)).sub_(w)
    return weighed.cost(miss, importance)


def _refit(table: Table, w: Tensor, importance: Tensor | None, scale: Tensor) -> Tensor:
    level = _levels(table, w, scale)
    heavy = level if importance is None else level * importance
    top, bottom = (heavy * w).sum(-1), (heavy * level).sum(-1)
    return torch.where((bottom > 0) & (top > 0), top / bottom, scale)
