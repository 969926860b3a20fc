"""The optimal-brain-surgeon sweep that chooses as it goes: a block of inputs loses its least weights by a score of what
they have become, and the inputs after it take up the error. See `obs` for the sweep itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lilliput.algebra import masks, obs
from lilliput.errors import LilliputError
from lilliput.target import Target

Score = Callable[[Tensor, int, int], Tensor]
"""What the weights of inputs [a, b) are worth, [b - a, out], from their values [b - a, out], a and b."""

Scope = Literal["block", "row"]
_SHORT = 16  # inputs of a pattern's group that are compared with each other all at once


def sweep(
    weight: Tensor, factor: obs.Factor, score: Score, target: Target, scope: Scope, block: int, support: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The mask bool [out, in] and the weights float32 [out, in], updated inside it and 0 outside.

    weight: float32 [out, in]; factor: in the order of the inputs. Of each `block` of inputs the least weights leave,
    of all rows together ("block") or of each row ("row"); N:M chooses among M inputs of a row when the sweep arrives
    there. The counts of blocks add up to those of the target, exactly. Outside `support` everything leaves.

    Raises PlanError where the target names neither sparsity nor pattern, or the pattern does not divide the width;
    LilliputError for scores that are not finite.
    """
    rows, width = weight.shape
    columns = weight.T.contiguous()
    deviation = torch.empty_like(columns)
    stays = torch.empty_like(columns, dtype=torch.bool)
    given = None if support is None else support.T
    pattern = None if target.pattern is None else masks.pattern_of(target.pattern, width)
    share = 0.0 if pattern else masks.share_of(target.sparsity)
    step = block if pattern is None else max(block // pattern[1], 1) * pattern[1]
    for a in range(0, width, step):
        b = min(a + step, width)
        aim = obs.reach(columns, deviation, factor, a, b)
        size = b - a if pattern is None else pattern[1]
        for c in range(a, b, size):
            d = c + size
            part = aim[c - a : d - a]
            if c > a:
                part.addmm_(factor.coupling[a:c, c:d].T, deviation[a:c])
            coupling = factor.coupling[c:d, c:d]
            worth = score(_free(part, columns[c:d], coupling), c, d)
            if pattern is not None:
                stays[c:d] = _of_group(worth, pattern[0])
            else:
                stays[c:d] = _of_block(worth, c, rows, share, scope)
            if given is not None:
                stays[c:d] &= given[c:d]
            obs.settle(part, deviation[c:d], columns[c:d], coupling, c, None, None, stays[c:d])
    values = deviation.neg_().add_(columns).mul_(stays)
    del columns, deviation
    return stays.T.contiguous(), values.T.contiguous()


def _free(aim: Tensor, columns: Tensor, coupling: Tensor) -> Tensor:
    """What some inputs become if all of them stay free, [columns, out]: what the errors before them have made of them.

    `aim` holds what each should become if those between it and the first stayed as they were in `columns`; but they
    move too: D = w - values solves D_j + sum of D_i T_ij over the inputs i < j here = w_j - aim_j.
    """
    moved: Tensor = torch.linalg.solve_triangular(coupling.T, aim - columns, upper=False, unitriangular=True)
    return moved.add_(columns)


def _of_group(worth: Tensor, n: int) -> Tensor:
    if not bool(torch.isfinite(worth.sum(dtype=torch.float64))):
        raise LilliputError("pruning scores contain NaN or infinity: check the weights and the calibration data")
    return masks.most(worth, n) if len(worth) <= _SHORT else masks.largest(worth.T, n).T


def _of_block(worth: Tensor, first: int, rows: int, share: float, scope: Scope) -> Tensor:
    """Mask [columns, out]: what has left after the block is round(share * n) of the n weights up to its end."""
    stop = first + len(worth)
    if scope == "row":
        return masks.largest(worth.T.contiguous(), stop - first - round(share * stop) + round(share * first)).T
    leave = round(share * rows * stop) - round(share * rows * first)
    return masks.largest(worth.T.reshape(1, -1), rows * (stop - first) - leave).view(rows, -1).T
