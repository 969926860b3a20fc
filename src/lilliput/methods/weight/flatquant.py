"""FlatQuant: inputs are multiplied by an affine matrix while the model runs, so that they and the weights are flat.

W x = (W T^-1)(T x) with T = L (x) R, the Kronecker product of matrices of p and q entries a side, p q the width and as
close as they can be: cheap to apply and to store. What a later step makes of the linear, it makes of W T^-1, by the
statistics of T x; where inputs are rounded, T x is.

The paper learns L and R on a block's outputs. Here they have a closed form. Let A and C be the [p, p] partial traces of
the inputs' Gram matrix and of WT W, both of trace p and with `damping` on the diagonal. L = Q M^1/2 with M the
geometric mean of A^-1 and C, M = A^-1/2 (A^1/2 C A^1/2)^1/2 A^-1/2: in this basis inputs and weights have the same
second moments, so neither is flattened at the price of the other, and a random orthogonal Q spreads what is left. R
likewise.

Paper: Sun et al. 2024, arXiv 2410.09426.
Cost: 2 n (p + q) operations a token, a Gram matrix, and decompositions of p x p. Limits: no training; masks do not
survive; engines' own layouts do not hold it.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra.rotations import orthogonal
from lilliput.errors import PlanError
from lilliput.parts.flat import Flat, FlatSpec
from lilliput.parts.layer import Layer
from lilliput.parts.scheme import Scheme
from lilliput.parts.transform import sides
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress


class Options(Strict):
    """See the module's docstring."""

    damping: float = Field(0.01, gt=0.0, le=10.0, description="added to the diagonals, as a share of their mean")
    seed: int = Field(0, ge=0, description="of the orthogonal matrices")


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """No part, one transform."""
    return Scheme(inputs=(FlatSpec(sides(width)[0]),))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a transform in front. Raises PlanError for a mask, which would not survive it."""
    if layer.support is not None:
        raise PlanError(f"{layer.name} is pruned, and a mask does not survive a transform: leave one of the two out")
    p, q = sides(stats.width)
    weight, gram = layer.rest().double(), stats.need("gram").double()
    energy = weight.T @ weight
    left = _balancing(_traced(gram, p, q, "right"), _traced(energy, p, q, "right"), o, 2 * o.seed)
    right = _balancing(_traced(gram, p, q, "left"), _traced(energy, p, q, "left"), o, 2 * o.seed + 1)
    return layer.between((Flat(left.float(), right.float()),))


def _traced(whole: Tensor, p: int, q: int, over: str) -> Tensor:
    """The partial trace of [p q, p q] over its right or left factor."""
    return torch.einsum("aibi->ab" if over == "right" else "aiaj->ij", whole.view(p, q, p, q))


def _balancing(inputs: Tensor, weights: Tensor, o: Options, seed: int) -> Tensor:
    """Q M^1/2, of two second moments [n, n]."""
    a, c = (_scaled(x, o.damping) for x in (inputs, weights))
    root, back = _power(a, 0.5), _power(a, -0.5)
    mean = back @ _power(root @ c @ root, 0.5) @ back
    return orthogonal(len(a), seed).to(a) @ _power((mean + mean.T) / 2, 0.5)


def _scaled(x: Tensor, damping: float) -> Tensor:
    """Of a mean diagonal of 1, with damping; the identity where there is nothing."""
    size = float(x.diagonal().mean())
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    return eye if size <= 0 else x / size + damping * eye


def _power(x: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(x)
    out: Tensor = (vectors * values.clamp(min=1e-12).pow(exponent)) @ vectors.T
    return out


METHOD = Compress(
    paper="Sun et al. 2024, arXiv 2410.09426",
    options=Options,
    needs=("gram",),
    writes="parts",
    covers={
        "flatquant": [
            {"method": "flatquant"},
            {"method": "gptq", "target": {"bits": 4, "group_size": "channel"}},
            {"method": "act-static-dynamic", "target": {"bits": 4}},
        ],
    },
    run=compress,
    scheme=scheme,
    rowwise=True,
    masked=False,
    double=True,
)
