"""The original in the coordinates of a model whose residual stream was rotated.

A rotation Q of the residual stream enters the embedding as E' = E Q, and nothing else does: where the embedding was not
compressed, Q is the orthogonal matrix that takes one table to the other, U VT of the singular value decomposition of
ET E' (Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem", doi:10.1007/BF02289451).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.model.rotated import ROWS, RotatedModel
from lilliput.model.weights import Model

_RESIDUE = 0.01  # relative difference that rounding a table to bfloat16 or float16 stays well under
_RANK = 1e-6  # smallest over largest singular value under which the tables do not say where every direction went


def turned_like(model: Model, against: Model) -> RotatedModel | None:
    """`against` rotated as `model` is: the same function, block by block in the coordinates of `model`.

    None where its residual stream cannot be rotated, or where no rotation takes its embedding to that of `model`.
    """
    try:
        plain = RotatedModel(against)
    except PlanError:
        return None
    matrix = _rotation(model, plain)
    if matrix is None:
        return None
    return plain.within([matrix] * (len(plain.skeleton.block_names) + 1), exact=True)


def _rotation(model: Model, against: RotatedModel) -> Tensor | None:
    """The orthogonal matrix [hidden, hidden], float64, between the embeddings; read a few thousand rows at a time."""
    width = against.skeleton.hidden_size
    cross, energy, whole = torch.zeros(width, width, dtype=torch.float64), 0.0, 0.0
    for name in against.outside.embeddings:
        count = against.shape(name)[0]
        for start in range(0, count, ROWS):
            stop = min(count, start + ROWS)
            theirs = against.base.read_rows(name, start, stop).double()
            ours = model.read_rows(name, start, stop).double()
            cross += theirs.T @ ours
            energy += float(theirs.square().sum())
            whole += float(ours.square().sum())
    if not bool(torch.isfinite(cross).all()):
        return None
    left, values, right = torch.linalg.svd(cross)
    # |E Q - E'|^2 = |E|^2 + |E'|^2 - 2 tr(QT ET E'), and that trace is the sum of the singular values.
    residue = max(0.0, energy + whole - 2.0 * float(values.sum()))
    if whole == 0.0 or residue > _RESIDUE**2 * whole or float(values[-1]) < _RANK * float(values[0]):
        return None
    rotation: Tensor = left @ right
    return rotation
