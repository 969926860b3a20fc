"""Which weights stay: exact counts, ties to the earlier weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError

_CHUNK = 1 << 22


def largest(score: Tensor, keep: int) -> Tensor:
    """Boolean mask of the `keep` largest scores of each row [rows, n]; among equals the earlier ones stay.

    Raises LilliputError for scores that are NaN or infinite.
    """
    rows, width = score.shape
    if not bool(torch.isfinite(score.sum(dtype=torch.float64))):
        raise LilliputError("pruning scores contain NaN or infinity: check the weights and the calibration data")
    if keep <= 0 or keep >= width:
        return torch.full_like(score, keep > 0, dtype=torch.bool)
    mask = torch.empty_like(score, dtype=torch.bool)
    step = max(1, _CHUNK // width)
    for a in range(0, rows, step):
        some = score[a : a + step]
        least = some.kthvalue(width - keep + 1, dim=1, keepdim=True).values
        above = some > least
        ties = some == least
        room = keep - above.sum(1, keepdim=True)
        mask[a : a + step] = above | (ties & (ties.cumsum(1, dtype=torch.int32) <= room))
    return mask


def most(score: Tensor, keep: int) -> Tensor:
    """Boolean mask of the `keep` largest scores of each column [n, columns]; among equals the earlier ones stay.

    For short columns: each score is compared with every other. Scores are finite.
    """
    count = score.shape[0]
    earlier = torch.ones(count, count, dtype=torch.bool, device=score.device).tril(-1)[:, :, None]
    ahead = (score > score[:, None]) | (earlier & (score == score[:, None]))
    return ahead.sum(1) < keep


def pattern_of(pattern: str, width: int) -> tuple[int, int]:
    """N and M of the pattern N:M. Raises PlanError where M does not divide the width."""
    n, m = (int(x) for x in pattern.split(":"))
    if width % m:
        raise PlanError(f"the pattern {pattern} does not divide a width of {width}: leave this layer out")
    return n, m


def share_of(sparsity: float | None) -> float:
    """The sparsity. Raises PlanError where there is none."""
    if sparsity is None:
        raise PlanError("a pruning step needs target.sparsity (0 to 1) or target.pattern (such as 2:4)")
    return sparsity


def kept(sparsity: float | None, pattern: str | None, scope: str, rows: int, width: int) -> int:
    """How many weights of a [rows, width] matrix `choose` keeps: n of every m by a pattern n:m, else all but
    round(sparsity * n) of every scope of n, a row or the whole layer. Raises PlanError when both are None."""
    if pattern is not None:
        n, m = pattern_of(pattern, width)
        return rows * (width // m) * n
    sparsity = share_of(sparsity)
    if scope == "row":
        return rows * (width - round(sparsity * width))
    return rows * width - round(sparsity * rows * width)


def choose(score: Tensor, sparsity: float | None, pattern: str | None, scope: str) -> Tensor:
    """The mask [out, in] that keeps N of every M inputs by the pattern N:M, or else a share `sparsity` of zeros within
    each row or the whole layer.

    round(sparsity * n) weights of a scope of n leave. Raises PlanError when both are None, or M does not divide the
    width.
    """
    rows, width = score.shape
    if pattern is not None:
        n, m = pattern_of(pattern, width)
        return largest(score.reshape(-1, m), n).view(rows, width)
    sparsity = share_of(sparsity)
    if scope == "row":
        return largest(score, width - round(sparsity * width))
    flat = score.reshape(1, -1)
    return largest(flat, flat.shape[1] - round(sparsity * flat.shape[1])).view(rows, width)
