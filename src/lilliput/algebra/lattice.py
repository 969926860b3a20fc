"""Descent on quantized weights under tr(D H DT), D = W - What: grids and codes improved in turn, never worse.

Matrices are [in, out]; `gram` is H, of which only symmetry is assumed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.algebra.obs import BLOCK, Nearest, Rounding, settle
from lilliput.algebra.ranges import stored


def loss(gram: Tensor, deviation: Tensor) -> float:
    """tr(D H DT) of deviations [in, out], the summed squared output error over the calibration tokens, in float64."""
    return float(((gram @ deviation).double() * deviation.double()).sum())


def polish(
    codes: Tensor,
    deviation: Tensor,
    gram: Tensor,
    ridge: float,
    rounding: Rounding,
    dtype: torch.dtype | None,
    support: Tensor | None,
) -> None:
    """One pass of exact line searches: for each group the scale, then each of its columns' codes, all rows at once.

    A scale moves to its least-squares value c H D / c H c rounded to `dtype` (None: scales stay), a code to the nearest
    of q_j + (H D)_j / H_jj; both only where the loss with H = gram + ridge * I falls. `codes` are centred float codes,
    updated in place like `deviation` and the scales in `rounding`. Groups are contiguous, in the order of the columns.
    """
    width = codes.shape[0]
    starts = [j for j in range(width) if j == 0 or rounding.group[j] != rounding.group[j - 1]]
    for start, stop in zip(starts, [*starts[1:], width], strict=True):
        group = rounding.group[start]
        if dtype is not None:
            _rescale(codes[start:stop], deviation, gram, ridge, rounding, group, dtype, start, stop)
        recode(codes, deviation, gram, ridge, rounding, support, start, stop)


def recode(
    codes: Tensor,
    deviation: Tensor,
    gram: Tensor,
    ridge: float,
    rounding: Nearest,
    support: Tensor | None,
    start: int,
    stop: int,
) -> None:
    """Take the codes of columns [start, stop), one after the other, to their best value given all others; the columns
    have one scale."""
    for a in range(start, stop, BLOCK):
        b = min(a + BLOCK, stop)
        corner = gram[a:b, a:b].clone()
        corner.diagonal().add_(ridge)
        pull = torch.addmm(deviation[a:b] * ridge, gram[a:b], deviation)
        diagonal = corner.diagonal().clone()
        diagonal.masked_fill_(diagonal == 0, 1.0)
        quantized = codes[a:b] * rounding.scale[rounding.group[a]]
        target = torch.addcdiv(quantized, pull, diagonal[:, None])
        deviations = torch.empty_like(target)
        mask = None if support is None else support[a:b]
        settle(target, deviations, quantized, corner.div_(diagonal), a, rounding, codes[a:b], mask)
        deviation[a:b] += deviations


def _rescale(
    codes: Tensor,
    deviation: Tensor,
    gram: Tensor,
    ridge: float,
    rounding: Rounding,
    group: int,
    dtype: torch.dtype,
    start: int,
    stop: int,
) -> None:
    own = deviation[start:stop]
    slope = ((gram[start:stop] @ deviation).add_(own, alpha=ridge) * codes).sum(0)
    bend = (((gram[start:stop, start:stop] @ codes).add_(codes, alpha=ridge)) * codes).sum(0)
    scale = rounding.scale[group]
    proposal = stored(torch.where(bend > 0, scale + slope / bend, scale), dtype)
    step = proposal - scale
    falls = (step * (step * bend - 2 * slope) < 0) & (proposal * scale > 0) & torch.isfinite(proposal)
    step = torch.where(falls, step, 0.0)
    own.addcmul_(codes, step, value=-1.0)
    scale.add_(step)
    rounding.inverse[group].copy_(scale.reciprocal())
