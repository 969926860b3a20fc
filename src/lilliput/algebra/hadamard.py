"""Hadamard transforms of order m * 2^k, m in {1, 12, 20}, with random signs: rotations that cost n log n.

Orders 12 and 20 by Paley's first construction from the quadratic residues modulo 11 and 19.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lilliput.errors import PlanError

_DENSE = 64  # the product is faster than the sums and differences of pairs up to here


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
    dtype.

    Raises PlanError for a width without a transform.
    """
    width = x.shape[-1]
    parts = factor(width)
    y = x.reshape(-1, *parts)
    for axis, order in enumerate(parts, start=1):
        y = y.movedim(axis, -1)
        # Sylvester's matrices are symmetric, Paley's are not.
        odd = order & (order - 1) != 0
        y = y @ (paley(order).T if transposed else paley(order)).to(y) if odd else _sylvester(y)
        y = y.movedim(-1, axis)
    return y.reshape(x.shape) / math.sqrt(width)


def _sylvester(x: Tensor) -> Tensor:
    """x [..., 2^k] times Sylvester's matrix, as products with matrices of at most `_DENSE` rows."""
    order = x.shape[-1]
    if order <= _DENSE:
        return x @ _dense(order).to(x)
    y = x.reshape(-1, order // _DENSE, _DENSE) @ _dense(_DENSE).to(x)
    return _sylvester(y.transpose(1, 2)).transpose(1, 2).reshape(x.shape)


@functools.cache
def _dense(order: int) -> Tensor:
    """Sylvester's matrix of order 2^k: float64, entries +-1."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < order:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def matrix(width: int, seed: int | None = None) -> Tensor:
    """The orthonormal Hadamard matrix [width, width], float64; with a seed its rows get random signs (diag(s) H)."""
    rotation = transform(torch.eye(width, dtype=torch.float64))
    if seed is None:
        return rotation
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.int64) * 2 - 1
    return rotation * signs[:, None]
