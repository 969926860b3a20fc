"""The best matrix of rank k under a weighted error.

All errors here are |diag(r) D M^(1/2)|^2 with D = W - What: row weights r^2, and a metric M of the inputs that is the
identity, a diagonal or a Gram matrix. Let U be the left singular vectors of diag(r) W M^(1/2). By Eckart and Young

    What = diag(r)^-1 U_k U_kT diag(r) W

is the optimum of rank k, with the error sum_{i>k} sigma_i^2. No inverse of M occurs, so that a singular Gram matrix is
as good as any. With r = 1 and the Gram matrix G, U are the eigenvectors of W G WT, the covariance of the outputs:
whitening by a root of G (SVD-LLM) and projecting on the outputs' leading directions (LoRD) are one and the same matrix.

Any root serves, as U depends on M alone; the smaller side of W is the one that is decomposed. float64 throughout:
squared singular values keep their leading digits down to 1e-8 of the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError

RIDGE = 1e-9  # of the mean of the metric's diagonal: orders directions that no input reaches by the weights themselves


@dataclass(frozen=True)
class Spectrum:
    """`basis` float64 [out, n]: orthonormal directions U of the (row-weighted) outputs; `energy` float64 [n]: squared
    singular values in units of the metric's mean diagonal, not rising; n = min(out, in)."""

    basis: Tensor
    energy: Tensor


def break_even(rows: int, width: int) -> int:
    """The least rank at which the factors hold as many numbers as the [rows, width] matrix."""
    return -(-rows * width // (rows + width))


def checked(rank: int, rows: int, width: int) -> int:
    """The rank itself. Raises PlanError where a [rows, width] matrix cannot have it."""
    if not 1 <= rank <= min(rows, width):
        raise PlanError(
            f"rank {rank} of a [{rows}, {width}] linear: give 1 to {min(rows, width)}, or exclude this layer"
        )
    return rank


def spectrum(
    weight: Tensor, metric: Tensor | None = None, rows: Tensor | None = None, root: Tensor | None = None
) -> Spectrum:
    """Decompose diag(rows) `weight` metric^(1/2); metric [in] (a diagonal), [in, in] or None; rows [out] or None.

    Cost: one eigendecomposition of the smaller side, and where there are fewer inputs than outputs and a matrix as
    metric one more, unless the `root` is at hand (`root_of`). Raises LilliputError for NaN or infinity in the weight or
    the metric.
    """
    matrix, metric = _finite(weight, metric)
    matrix = matrix if rows is None else matrix * rows.double()[:, None]
    if matrix.shape[0] <= matrix.shape[1]:
        image = matrix if metric is None else matrix * metric if metric.dim() == 1 else matrix @ metric
        energy, basis = torch.linalg.eigh(_symmetric(image @ matrix.T))
        return Spectrum(basis.flip(1), energy.flip(0).clamp_min(0.0))
    if metric is not None and metric.dim() == 1:
        matrix = matrix * metric.sqrt()
    elif metric is not None:
        matrix = matrix @ (_root(metric) if root is None else root)
    energy, right = torch.linalg.eigh(_symmetric(matrix.T @ matrix))
    # Orthonormal also where a singular value is 0: whatever completes the basis.
    basis = torch.linalg.qr(matrix @ right.flip(1)).Q
    return Spectrum(basis, energy.flip(0).clamp_min(0.0))


def root_of(weight: Tensor, metric: Tensor | None) -> Tensor | None:
    """What `spectrum` needs of a metric for every matrix of this shape, float64 [in, in]; None where it needs nothing.

    Raises LilliputError as it does.
    """
    if metric is None or metric.dim() == 1 or weight.shape[0] <= weight.shape[1]:
        return None
    _, metric = _finite(weight, metric)
    return None if metric is None else _root(metric)


def project(left: Tensor, weight: Tensor, rows: Tensor | None = None) -> Tensor:
    """The right factor float64 [rank, in] that makes left [out, rank] times it nearest to `weight` [out, in].

    Least squares by the singular value decomposition of `left`, so that factors of any condition serve. It is the
    optimum under every metric of the inputs; `rows` [out] weighs the outputs.
    """
    factor, aim = left.double(), weight.double()
    if rows is not None:
        factor, aim = factor * rows.double()[:, None], aim * rows.double()[:, None]
    u, s, vt = torch.linalg.svd(factor, full_matrices=False)
    floor = s[:1] * max(factor.shape) * torch.finfo(s.dtype).eps
    inverse = torch.where(s > floor, 1.0 / s.clamp_min(torch.finfo(s.dtype).tiny), 0.0)
    out: Tensor = vt.T @ (inverse[:, None] * (u.T @ aim))
    return out


def squared(difference: Tensor, metric: Tensor | None = None) -> float:
    """tr(D M DT) of a difference D [out, in], in float64; the metric as in `spectrum`."""
    d = difference.double()
    if metric is None:
        return float(d.square().sum())
    image = d * metric.double() if metric.dim() == 1 else d @ metric.double()
    return max(float((image * d).sum()), 0.0)


def tails(weight: Tensor, basis: Tensor, metric: Tensor | None) -> Tensor:
    """Squared errors under `metric` of the projections on the first 0, 1, ..., n directions of `basis` [out, n].

    float64 [n + 1], not rising; exact for any orthonormal basis. The matrix of all errors is never formed: the part
    that direction u takes off is uT W M WT u. n = min(out, in) directions that span the columns of W leave 0.
    """
    image = basis.T @ weight.double()
    weighted = image if metric is None else image * metric.double() if metric.dim() == 1 else image @ metric.double()
    gains = (weighted * image).sum(1).clamp_min(0.0)
    errors = gains.flip(0).cumsum(0).flip(0)
    return torch.cat([errors, errors.new_zeros(1)])


def _finite(weight: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in float64, the metric over the mean of its diagonal and with a ridge on it."""
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise LilliputError(f"the weight contains {bad} values that are NaN or infinite: it cannot be factored")
    if metric is None:
        return weight.double(), None
    if not bool(torch.isfinite(metric).all()):
        raise LilliputError("the Gram matrix of a layer's inputs contains NaN or infinity: check the calibration data")
    metric = metric.double()
    mean = float((metric if metric.dim() == 1 else metric.diagonal()).mean())
    if mean <= 0.0:
        return weight.double(), None  # no token came by: the weights are all that is known
    metric = metric / mean
    (metric if metric.dim() == 1 else metric.diagonal()).add_(RIDGE)
    return weight.double(), metric


def _root(metric: Tensor) -> Tensor:
    """R with R RT = metric [n, n]; rounding may have left it slightly indefinite."""
    values, vectors = torch.linalg.eigh(_symmetric(metric))
    root: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return root


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
