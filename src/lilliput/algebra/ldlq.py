"""The sweep of `algebra.obs` and the descent of `algebra.lattice` for any way to round a column of weights.

`nearest` gets one input's weights [out] and returns their codes and values, both [out]: the best that the format has
for the column as a whole. So vectors and walks that run down a column lose none of the feedback between inputs.
Matrices are [in, out].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lilliput.algebra.obs import BLOCK, Factor, reach

Nearest = Callable[[Tensor], tuple[Tensor, Tensor]]


def sweep(weight: Tensor, factor: Factor, nearest: Nearest, codes: Tensor) -> Tensor:
    """LDLQ over all columns: writes `codes` [in, out] and returns the deviations W - What, float32 [in, out]."""
    deviation = torch.empty_like(weight)
    for a in range(0, len(weight), BLOCK):
        b = min(a + BLOCK, len(weight))
        aim = reach(weight, deviation, factor, a, b)
        _settle(aim, weight[a:b], factor.coupling[a:b, a:b], nearest, codes[a:b], deviation[a:b])
    return deviation


def polish(weight: Tensor, deviation: Tensor, gram: Tensor, ridge: float, nearest: Nearest, codes: Tensor) -> None:
    """One pass of exact descent with H = gram + ridge * I: each column in turn takes its best value given all others.

    That is the value nearest to what_j + (H D)_j / H_jj, because outputs do not interact. `codes` and `deviation` are
    updated in place; the loss tr(D H DT) never rises where `nearest` finds the nearest.
    """
    for a in range(0, len(weight), BLOCK):
        b = min(a + BLOCK, len(weight))
        corner = gram[a:b, a:b].clone()
        corner.diagonal().add_(ridge)
        diagonal = corner.diagonal().clone()
        diagonal.masked_fill_(diagonal == 0, 1.0)
        pull = torch.addmm(deviation[a:b] * ridge, gram[a:b], deviation)
        held = weight[a:b] - deviation[a:b]
        moved = torch.empty_like(held)
        _settle(torch.addcdiv(held, pull, diagonal[:, None]), held, corner / diagonal, nearest, codes[a:b], moved)
        deviation[a:b] += moved


def _settle(aim: Tensor, weight: Tensor, coupling: Tensor, nearest: Nearest, codes: Tensor, deviation: Tensor) -> None:
    for j in range(len(aim)):
        value = aim[j] if j == 0 else torch.addmv(aim[j], deviation[:j].T, coupling[:j, j])
        codes[j], got = nearest(value)
        torch.sub(weight[j], got, out=deviation[j])
