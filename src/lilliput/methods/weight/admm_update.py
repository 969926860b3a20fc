"""ADMM update: the values of least output error for the weights that a pruning step has kept.

Given the mask M of an earlier step, minimises tr((W - V) H (W - V)T) over V that are 0 outside M, H = XT X with damping
and shrinkage as in gptq. Inputs are first scaled to unit norm, so that H has ones on its diagonal and W becomes
W * |X_j|. With A = (H + rho I)^-1 the alternating directions are

    V = (W H + rho (Z - T)) A,    Z = M * (V + T),    T <- T + V - Z

from Z = what the layer holds so far (SparseGPT's update, or the kept weights themselves) and T = 0. Z is returned,
scaled back: of each row the better one of this and of what was there, so that no row's loss rises. A step that
quantizes afterwards solves for the original weight and makes no use of these values.

Paper: Boza 2024 (Fast and Effective Weight Update for Pruned Large Language Models), arXiv 2401.02938; rho = 1, 20
steps. Cost: out * in^2 multiply-adds for each step, 2048 rows at a time; in^3 for the inverse. Memory: three matrices
[in, in].
Limits: the mask stays (no gradual choice of it); strongly related inputs take more steps to converge.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import masked, obs
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress


class Options(Strict):
    """See the module's docstring."""

    steps: int = Field(20, ge=0, le=10000, description="rounds of alternating directions")
    rho: float = Field(1.0, gt=0.0, description="penalty, in units of an input's scaled norm")
    damping: float = Field(0.01, ge=0.0, le=10.0, description="added to the Gram diagonal, as a share of its mean")
    shrinkage: float = Field(
        0.2, ge=0.0, le=10.0, description="added to each Gram diagonal entry, as a share of itself"
    )


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with updated values. Raises LilliputError for a layer that is not pruned, and for a Gram matrix that is
    not finite."""
    mask, weight, values = layer.need_support(), layer.rest(), layer.decode()
    matrix = obs.regularized(stats.need("gram"), o.damping, o.shrinkage)
    norm = matrix.diagonal().sqrt()
    matrix.div_(norm).div_(norm[:, None])
    penalized = matrix.clone()
    penalized.diagonal().add_(o.rho)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(penalized))
    del penalized
    for a in range(0, len(weight), masked.ROWS):
        rows = slice(a, a + masked.ROWS)
        found = _directions(weight[rows] * norm, values[rows] * norm, mask[rows], matrix, inverse, o)
        values[rows] = found / norm
    return layer.refined(mask, values)


def _directions(weight: Tensor, start: Tensor, mask: Tensor, matrix: Tensor, inverse: Tensor, o: Options) -> Tensor:
    """Z of some rows, of scaled inputs; rows that have not gained by it are those of `start`."""
    pull = weight @ matrix
    z, t = start, torch.zeros_like(start)
    for _ in range(o.steps):
        v = torch.add(pull, z - t, alpha=o.rho) @ inverse
        t = t.add_(v)
        z = t * mask
        t = t.sub_(z)
    worse = masked.losses(weight, z, matrix) > masked.losses(weight, start, matrix)
    return torch.where(worse[:, None], start, z)


METHOD = Compress(
    paper="Boza 2024, arXiv 2401.02938",
    options=Options,
    needs=("gram",),
    writes="support",
    refines=True,
    covers={"admm-update": [{"method": "wanda", "target": {"sparsity": 0.5}}, {"method": "admm-update"}]},
    run=compress,
    rowwise=True,
)
