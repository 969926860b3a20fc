"""The sweep of `algebra.obs` and the descent of `algebra.lattice` for any way to round a column of weights.

Outputs do not interact, so a column may be rounded as a whole: vectors and walks that run down a column lose none of
the feedback between inputs. Matrices are [in, out].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lilliput.algebra.obs import BLOCK, Factor, reach

# One input's weights [out] to their codes and values, both [out]: the best that the format has for the whole column.
Nearest = Callable[[Tensor], tuple[Tensor, Tensor]]


class Settle(Protocol):
    """Go through a block's columns and write their codes and their deviations from `weight`.

    aim, weight, codes, deviation: [columns, out]; column j is rounded to what is nearest to aim_j + sum over i < j of
    coupling_ij * deviation_i.
    """

    def __call__(self, aim: Tensor, weight: Tensor, coupling: Tensor, codes: Tensor, deviation: Tensor, /) -> None: ...


def by_column(nearest: Nearest) -> Settle:
    """A call of `nearest` for each column."""

    def settle(aim: Tensor, weight: Tensor, coupling: Tensor, codes: Tensor, deviation: Tensor) -> None:
        for j in range(len(aim)):
            value = aim[j] if j == 0 else torch.addmv(aim[j], deviation[:j].T, coupling[:j, j])
            codes[j], rounded = nearest(value)
            torch.sub(weight[j], rounded, out=deviation[j])

    return settle


def sweep(weight: Tensor, factor: Factor, settle: Settle, codes: Tensor) -> Tensor:
    """LDLQ over all columns: writes `codes` [in, out] and returns the deviations W - What, float32 [in, out]."""
    deviation = torch.empty_like(weight)
    for a in range(0, len(weight), BLOCK):
        b = min(a + BLOCK, len(weight))
        aim = reach(weight, deviation, factor, a, b)
        settle(aim, weight[a:b], factor.coupling[a:b, a:b], codes[a:b], deviation[a:b])
    return deviation


def polish(weight: Tensor, deviation: Tensor, gram: Tensor, ridge: float, settle: Settle, codes: Tensor) -> None:
    """One pass of exact descent with H = gram + ridge * I: each column in turn takes its best value given all others.

    That is the value nearest to what_j + (H D)_j / H_jj, because outputs do not interact. `codes` and `deviation` are
    updated in place; the loss tr(D H DT) never rises where `settle` finds the nearest.
    """
    for a in range(0, len(weight), BLOCK):
        b = min(a + BLOCK, len(weight))
        corner = gram[a:b, a:b].clone()
        corner.diagonal().add_(ridge)
        diagonal = corner.diagonal().clone()
        diagonal.masked_fill_(diagonal == 0, 1.0)
        pull = torch.addmm(deviation[a:b] * ridge, gram[a:b], deviation)
        quantized = weight[a:b] - deviation[a:b]
        deviations = torch.empty_like(quantized)
        settle(torch.addcdiv(quantized, pull, diagonal[:, None]), quantized, corner / diagonal, codes[a:b], deviations)
        deviation[a:b] += deviations
