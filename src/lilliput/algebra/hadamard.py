"""Hadamard transforms of order m * 2^k, m in {1, 12, 20}, with random signs: rotations that cost n sqrt(n).

Orders 12 and 20 by Paley's first construction from the quadratic residues modulo 11 and 19.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lilliput.errors import PlanError


@functools.cache
def paley(order: int) -> Tensor:
    """The Paley Hadamard matrix of `order` = q + 1, q a prime with q mod 4 = 3: float64, entries +-1, H HT = order * I;
    do not write into it.

    Raises ValueError for another order.
    """
    q = order - 1
    if q < 3 or q % 4 != 3 or any(q % d == 0 for d in range(2, int(q**0.5) + 1)):
        raise ValueError(f"no Paley matrix of order {order}: {q} is not a prime that leaves 3 when divided by 4")
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    skew = torch.zeros(order, order, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return skew + torch.eye(order, dtype=torch.float64)


def factor(width: int) -> tuple[int, ...]:
    """Orders of Hadamard matrices whose product is `width`: any of 12 and 20, then powers of 2.

    Raises PlanError when there is no such product.
    """
    parts: list[int] = []
    rest = width
    for odd, order in ((3, 12), (5, 20)):
        while rest > 0 and rest % odd == 0:
            if rest % order:
                break
            parts.append(order)
            rest //= order
    if rest < 1 or rest & (rest - 1):
        raise PlanError(
            f"no Hadamard transform of width {width}: it has to be a power of 2 times factors of 12 and 20; "
            "use a random orthogonal matrix instead"
        )
    return (*parts, rest) if rest > 1 or not parts else tuple(parts)


def transform(x: Tensor, *, transposed: bool = False) -> Tensor:
    """x [..., n] times the orthonormal Hadamard matrix of order n, or times its transpose, which undoes it; in x's
    dtype. The matrix is a Kronecker product of two about equally large ones: two small products in its place.

    Raises PlanError for a width without a transform.
    """
    width = x.shape[-1]
    left, right = (t.to(x) for t in _halves(width))
    # Products round by how a matrix lies in memory: what is equal has to stay equal.
    y = x.reshape(-1, len(left), len(right)).contiguous()
    # y (L (x) R) is LT Y R, and y (L (x) R)T is L Y RT.
    y = left @ (y @ right.T) if transposed else left.T @ (y @ right)
    return y.reshape(x.shape)


def sides(width: int) -> tuple[int, int]:
    """Orders of the two matrices that `transform` multiplies by. Raises PlanError for a width without a transform."""
    left, right = _halves(width)
    return len(left), len(right)


@functools.lru_cache(maxsize=32)
def _halves(width: int) -> tuple[Tensor, Tensor]:
    """Two matrices whose Kronecker product is the orthonormal Hadamard matrix of order `width`, float64."""
    matrices: list[Tensor] = []
    for order in factor(width):
        if order & (order - 1):
            matrices.append(paley(order))  # not symmetric, unlike Sylvester's
        else:
            matrices += [torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)] * (order.bit_length() - 1)
    middle = min(
        range(len(matrices) + 1), key=lambda n: sum(math.prod(map(len, x)) for x in (matrices[:n], matrices[n:]))
    )
    left, right = (
        functools.reduce(torch.kron, x, torch.ones(1, 1).double()) for x in (matrices[:middle], matrices[middle:])
    )
    return left, right / math.sqrt(width)


def matrix(width: int, seed: int | None = None) -> Tensor:
    """The orthonormal Hadamard matrix [width, width], float64; with a seed its rows get random signs (diag(s) H)."""
    rotation = transform(torch.eye(width, dtype=torch.float64))
    if seed is None:
        return rotation
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.int64) * 2 - 1
    return rotation * signs[:, None]
