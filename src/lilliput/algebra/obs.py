"""The optimal-brain-surgeon sweep under GPTQ and SparseGPT: quantize or zero one input after the other, and let the
inputs that are still free take up the error.

GPTQ (arXiv 2210.17323) keeps U, the upper Cholesky factor of the inverse Gram matrix, H^-1 = UT U. Here H itself is
factored, H = R RT with R upper triangular, so that U = R^-1 and nothing is inverted:
with D = W - What and E the scaled errors of the sweep, D = E U is D R = E, whose column j says that the value to round
is

    w_j + sum_{i<j} D_i T_ij,    T_ij = R_ij / R_jj,    1 / U_jj = R_jj

(the form of LDLQ, arXiv 2307.13304; equal to GPTQ's in exact arithmetic). Only D is carried along, W is only read, and
the loss tr(D H DT) is the sum over j of R_jj^2 times the squared rounding error of that value.

Matrices are held as [in, out] here, so that one input's weights are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lilliput.errors import LilliputError

BLOCK = 128
_MICRO = 32  # columns between two matrix products inside a block


@dataclass(frozen=True)
class Factor:
    """A factored Gram matrix of width n, in the order of the sweep.

    `coupling` float32 [n, n]: T, strictly upper triangular (the rest is not read); `pivot` float32 [n]: R_jj = 1 /
    U_jj; `damping`: what was added to the diagonal, as a share of its mean.
    """

    coupling: Tensor
    pivot: Tensor
    damping: float


def factorize(gram: Tensor, damping: float = 0.01, order: Tensor | None = None, shrinkage: float = 0.0) -> Factor:
    """Factor `gram` + shrinkage * diag(gram) + damping * mean(diagonal) * I, rows and columns in `order` (int64 [n]).

    Shrinkage takes every correlation between inputs down by 1 / (1 + shrinkage): what the calibration text shows of
    them is partly its own. Unlike damping it does so alike for strong and for weak inputs.

    float32 first, then float64, then ten times the damping (from 1e-4 if it was 0), until the matrix is positive
    definite. A channel that was never active couples to none and is rounded to nearest; an empty Gram matrix gives T =
    0. At most two matrices of the size of `gram`, which is left as it is, are alive at a time (in float32).

    Raises LilliputError where the Gram matrix holds NaN or infinity.
    """
    diagonal = gram.diagonal()
    mean = float(diagonal.double().mean()) if len(diagonal) else 0.0
    if not 0.0 <= mean < float("inf"):
        raise LilliputError("the Gram matrix of a layer's inputs contains NaN or infinity: check the calibration data")
    if mean == 0.0:
        return Factor(torch.zeros_like(gram), torch.ones_like(diagonal), damping)
    reverse = torch.arange(len(diagonal) - 1, -1, -1, device=gram.device) if order is None else order.flip(0)
    while damping < 1e6:
        for dtype in (torch.float32, torch.float64):
            lower = _cholesky(gram, reverse, damping * mean, shrinkage, dtype)
            if lower is None:
                continue
            upper = lower.flip(0, 1)
            del lower
            pivot = upper.diagonal().clone()
            coupling = upper.div_(pivot).float()
            return Factor(coupling, pivot.float(), damping)
        damping = max(10 * damping, 1e-4)
    raise LilliputError("the Gram matrix of a layer's inputs is not positive definite at any damping: check the data")


def inverse_diagonal(factor: Factor) -> Tensor:
    """diag(H^-1), float32 [n], in the order of the sweep: the squared columns of U = R^-1 summed. n^3 / 3."""
    eye = torch.eye(len(factor.pivot), dtype=torch.float32, device=factor.pivot.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor.coupling, eye, upper=True, unitriangular=True)
    return inverse.div_(factor.pivot[:, None]).square_().sum(0)


def diagonal(factor: Factor) -> Tensor:
    """diag(H), float32 [n], in the order of the sweep, with all that was added to it."""
    root = factor.coupling.triu(1).mul_(factor.pivot)
    return root.square_().sum(1).add_(factor.pivot.square())


def regularized(gram: Tensor, damping: float, shrinkage: float) -> Tensor:
    """H as `factorize` takes it, float32 [n, n]; a channel that was never active has 1 on its diagonal where damping
    leaves it at 0. Raises LilliputError where the Gram matrix holds NaN or infinity."""
    matrix = gram.float().clone()
    entries = matrix.diagonal()
    mean = float(entries.double().mean()) if len(entries) else 0.0
    if not 0.0 <= mean < float("inf"):
        raise LilliputError("the Gram matrix of a layer's inputs contains NaN or infinity: check the calibration data")
    entries.mul_(1.0 + shrinkage).add_(damping * mean)
    entries.add_((entries == 0).float())
    return matrix


def _cholesky(gram: Tensor, order: Tensor, ridge: float, shrinkage: float, dtype: torch.dtype) -> Tensor | None:
    matrix = gram[order][:, order].to(dtype) if dtype is not torch.float32 else gram[order].float()[:, order]
    diagonal = matrix.diagonal()
    diagonal.mul_(1.0 + shrinkage).add_(ridge)
    diagonal.add_((diagonal == 0) * matrix.new_tensor(1.0))
    lower, info = torch.linalg.cholesky_ex(matrix)
    usable = int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()) and bool((lower.diagonal() > 0).all())
    return lower if usable else None


class Nearest(Protocol):
    """How the sweep rounds: a column's value is code * scale of its group, whatever the code is."""

    @property
    def scale(self) -> Sequence[Tensor]:
        """For each group, float32 [out]."""
        ...

    @property
    def group(self) -> Sequence[int]:
        """The group of each column, in sweep order."""
        ...

    def nearest(self, column: int, value: Tensor, code: Tensor) -> None:
        """Write the code nearest to value [out] into code [out]."""
        ...


@dataclass(frozen=True)
class Rounding:
    """The grids of a matrix as the sweep reads them: for each group, one contiguous float32 vector [out] of 1 / scale,
    scale, and smallest and largest centred code (code - zero); `group`: the group of each column, in sweep order."""

    inverse: Sequence[Tensor]
    scale: Sequence[Tensor]
    low: Sequence[Tensor]
    high: Sequence[Tensor]
    group: Sequence[int]
    limits: tuple[float, float] | None = None  # the window where all share it
    snap: Callable[[Tensor], None] | None = None  # levels in place of whole numbers: rounds its argument to them
    part: Sequence[Tensor] | None = None  # what zero points have beyond whole numbers; codes less it are whole

    @staticmethod
    def of(scale: Tensor, zero: Tensor | None, bits: int, rows: int, group: Sequence[int]) -> Rounding:
        """From a grid's scale and zero [out, groups] ([1, 1]: per tensor), for `rows` outputs."""
        step = scale.float().expand(rows, -1).T.contiguous()
        lowest, highest = float(-(1 << (bits - 1))), float((1 << (bits - 1)) - 1)
        inverse = step.reciprocal().unbind(0)
        if zero is None:
            return Rounding(inverse, step.unbind(0), (), (), group, (lowest, highest))
        offset = zero.float().expand(rows, -1).T.contiguous()
        part = offset - offset.round()
        return Rounding(
            inverse,
            step.unbind(0),
            (lowest - offset).unbind(0),
            (highest - offset).unbind(0),
            group,
            part=part.unbind(0) if bool(part.any()) else None,
        )

    @staticmethod
    def levels(scale: Tensor, snap: Callable[[Tensor], None], rows: int, group: Sequence[int]) -> Rounding:
        """From the scales [out, groups] ([1, 1]: per tensor) of levels that `snap` rounds to in place, 0 among them. A
        centred code is the level itself."""
        step = scale.float().expand(rows, -1).T.contiguous()
        return Rounding(step.reciprocal().unbind(0), step.unbind(0), (), (), group, snap=snap)

    def nearest(self, column: int, value: Tensor, code: Tensor) -> None:
        """Write the centred code nearest to value [out] into code [out]."""
        g = self.group[column]
        torch.mul(value, self.inverse[g], out=code)
        if self.snap is not None:
            self.snap(code)
            return
        if self.part is None:
            code.round_()
        else:
            code.add_(self.part[g]).round_().sub_(self.part[g])
        if self.limits is not None:
            code.clamp_(*self.limits)
        else:
            torch.maximum(code, self.low[g], out=code)
            torch.minimum(code, self.high[g], out=code)


def reach(weight: Tensor, deviation: Tensor, factor: Factor, a: int, b: int) -> Tensor:
    """What columns [a, b) should become, given the deviations of all before them: [b - a, out]."""
    if a == 0:
        return weight[:b].clone()
    return torch.addmm(weight[a:b], factor.coupling[:a, a:b].T, deviation[:a])


def settle(
    target: Tensor,
    deviation: Tensor,
    weight: Tensor,
    coupling: Tensor,
    first: int,
    rounding: Nearest | None,
    codes: Tensor | None,
    support: Tensor | None,
) -> None:
    """Go through one block's columns: write their codes and their deviations from `weight`.

    target, weight, deviation, codes, support: [columns, out], of this block only; `target` is overwritten; `coupling`
    [columns, columns]: T within the block; `first`: the block's first column in sweep order. Without `rounding` a
    column inside the support keeps its target exactly (pruning); outside it becomes 0, and the error is passed on.
    """
    count = target.shape[0]
    zero = None if support is None else (~support).float()
    for a in range(0, count, _MICRO):
        b = min(a + _MICRO, count)
        if a:
            target[a:b].addmm_(coupling[:a, a:b].T, deviation[:a])
        past = deviation[a:b].T
        for j in range(a, b):
            value, miss = target[j], deviation[j]
            if j > a:
                value.addmv_(past[:, : j - a], coupling[a:j, j])
            if rounding is None or codes is None:
                if zero is None:
                    torch.sub(weight[j], value, out=miss)
                else:
                    torch.addcmul(weight[j] - value, value, zero[j], out=miss)
                continue
            code = codes[j]
            rounding.nearest(first + j, value, code)
            if support is not None:
                code.mul_(support[j])
            torch.addcmul(weight[j], code, rounding.scale[rounding.group[first + j]], value=-1.0, out=miss)
