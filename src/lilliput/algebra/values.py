"""The sweep of `algebra.obs` on values instead of codes: for grids without a common step, and for weights kept exactly.

What rounds a column writes its new value where `obs.settle` expects a code, with a scale of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.algebra import obs

_ROWS = 2048  # outputs swept together: their working matrices stay small and one block of them in cache


@dataclass(frozen=True)
class Levels:
    """Any values, nearest wins, to the lower one on a tie.

    table: for each group float32 [out, k], ascending; bounds: halfway between them; group: the group of each column, in
    the order of the sweep.
    """

    table: Sequence[Tensor]
    bounds: Sequence[Tensor]
    group: Sequence[int]
    scale: Sequence[Tensor]

    @staticmethod
    def of(table: Tensor, group: Sequence[int]) -> Levels:
        """From levels float32 [out, groups, k]."""
        ordered = table.transpose(0, 1).contiguous()
        bounds = ((ordered[..., 1:] + ordered[..., :-1]) / 2).unbind(0)
        ones = torch.ones(len(table), device=table.device)
        return Levels(ordered.unbind(0), bounds, group, [ones] * len(ordered))

    def nearest(self, column: int, value: Tensor, code: Tensor) -> None:
        g = self.group[column]
        index = torch.searchsorted(self.bounds[g], value.unsqueeze(1))
        torch.gather(self.table[g], 1, index, out=code.unsqueeze(1))


@dataclass(frozen=True)
class Kept:
    """A rounding that leaves the weights of `mask` [in, out] (in sweep order) exactly what they have become."""

    inner: obs.Nearest
    mask: Tensor
    group: Sequence[int]
    scale: Sequence[Tensor]

    @staticmethod
    def of(inner: obs.Nearest, mask: Tensor) -> Kept:
        ones = torch.ones(mask.shape[1], device=mask.device)
        return Kept(inner, mask, inner.group, [ones] * len(inner.scale))

    def nearest(self, column: int, value: Tensor, code: Tensor) -> None:
        self.inner.nearest(column, value, code)
        code.mul_(self.inner.scale[self.group[column]])
        torch.where(self.mask[column], value, code, out=code)


def sweep(
    weight: Tensor,
    factor: obs.Factor,
    order: Tensor | None,
    rounding: Callable[[int, int], obs.Nearest],
    block: int = obs.BLOCK,
    support: Tensor | None = None,
    targets: Tensor | None = None,
) -> Tensor:
    """Round all inputs in `order` (int64 [in]; None: as they stand), errors pushed onto those that are still free.

    `rounding(a, b)` rounds output rows [a, b), its columns in sweep order. Returns the new values, float32 [out, in],
    and writes into `targets`, of the same shape, what they were rounded from; the loss with the factored matrix is the
    sum of (pivot * (target - value))^2. Outside `support` [out, in] the values are 0.
    """
    values = torch.empty_like(weight)
    for a in range(0, len(weight), _ROWS):
        b = min(a + _ROWS, len(weight))
        some = None if support is None else support[a:b]
        aims = None if targets is None else targets[a:b]
        values[a:b] = _rows(weight[a:b], factor, order, rounding(a, b), block, some, aims)
    return values


def _rows(
    weight: Tensor,
    factor: obs.Factor,
    order: Tensor | None,
    rounding: obs.Nearest,
    block: int,
    support: Tensor | None,
    targets: Tensor | None,
) -> Tensor:
    columns = weight.T.contiguous() if order is None else weight.T[order]
    mask = None
    if support is not None:
        mask = support.T.contiguous() if order is None else support.T[order]
    deviation, values = torch.empty_like(columns), torch.empty_like(columns)
    width = len(columns)
    for a in range(0, width, block):
        b = min(a + block, width)
        aim = obs.reach(columns, deviation, factor, a, b)
        some = None if mask is None else mask[a:b]
        obs.settle(aim, deviation[a:b], columns[a:b], factor.coupling[a:b, a:b], a, rounding, values[a:b], some)
        values[a:b].mul_(torch.stack([rounding.scale[g] for g in rounding.group[a:b]]))
        if targets is not None:  # `aim` is now what `settle` rounded each column from
            targets[:, slice(a, b) if order is None else order[a:b]] = aim.T
    del columns, deviation
    return values.T if order is None else torch.empty_like(values).index_copy_(0, order, values).T
