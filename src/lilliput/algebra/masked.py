"""Least squares on a mask: the weights V, 0 outside M, of least tr((W - V) H (W - V)T). Rows are independent, and a few
thousand are solved at once: no row's own system [kept, kept] is ever formed."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 2048


def losses(weight: Tensor, values: Tensor, matrix: Tensor) -> Tensor:
    """(W - V) H (W - V)T of each row, [rows]."""
    miss = weight - values
    return (miss @ matrix).mul_(miss).sum(1)


def refit(weight: Tensor, mask: Tensor, matrix: Tensor, steps: int, tolerance: float = 1e-6) -> Tensor:
    """V float32 [out, in] by conjugate gradients from V = M * W, with the diagonal of H as preconditioner.

    weight: float32 [out, in]; mask: bool; matrix: H, float32 [in, in], positive semidefinite with a positive diagonal.
    At most `steps` steps, each one product [out, in] x [in, in]; a row is done when its gradient has fallen to
    `tolerance` of the first. The loss of no row rises.
    """
    values = torch.empty_like(weight)
    for a in range(0, len(weight), ROWS):
        values[a : a + ROWS] = _refit(weight[a : a + ROWS], mask[a : a + ROWS], matrix, steps, tolerance)
    return values


def _refit(weight: Tensor, mask: Tensor, matrix: Tensor, steps: int, tolerance: float) -> Tensor:
    values = torch.where(mask, weight, 0.0)
    diagonal = matrix.diagonal()
    rest = ((weight - values) @ matrix).mul_(mask)
    scaled = rest / diagonal
    direction = scaled.clone()
    size = (rest * scaled).sum(1, keepdim=True)
    enough = size * tolerance**2
    for _ in range(steps):
        if bool((size <= enough).all()):
            break
        turned = (direction @ matrix).mul_(mask)
        curve = (direction * turned).sum(1, keepdim=True)
        step = torch.where((curve > 0) & (size > enough), size / curve.clamp(min=torch.finfo(curve.dtype).tiny), 0.0)
        values.addcmul_(direction, step)
        rest.addcmul_(turned, step, value=-1.0)
        scaled = rest / diagonal
        before, size = size, (rest * scaled).sum(1, keepdim=True)
        direction.mul_(size / before.clamp(min=torch.finfo(before.dtype).tiny)).add_(scaled)
    return values
