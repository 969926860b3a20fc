"""Hadamard matrices of any order that Paley's two constructions and Sylvester's doubling reach; no tables."""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.errors import PlanError


def hadamard(order: int) -> Tensor:
    """A matrix [order, order] of +1 and -1 with orthogonal rows, float64. Raises PlanError where none is known here."""
    seed = _seed(order)
    if seed is None:
        raise PlanError(f"no Hadamard matrix of order {order} can be built: orders are a power of two times a Paley order")
    out = _paley(seed)
    while out.shape[0] < order:
        out = torch.cat((torch.cat((out, out), 1), torch.cat((out, -out), 1)))
    return out


def exists(order: int) -> bool:
    """Whether `hadamard(order)` can be built."""
    return _seed(order) is not None


def randomized(order: int, seed: int) -> Tensor:
    """A random orthogonal matrix [order, order], float64: a Hadamard matrix, scaled, with random signs of its rows."""
    rng = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (order,), generator=rng, dtype=torch.float64) * 2 - 1
    return hadamard(order).mul_(signs[:, None]).div_(order**0.5)


def orthogonal(order: int, seed: int) -> Tensor:
    """A random orthogonal matrix [order, order], float64, uniform over all of them."""
    rng = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(order, order, generator=rng, dtype=torch.float64))
    return q * r.diagonal().sign()


def _seed(order: int) -> int | None:
    """The smallest order m of Paley's with order = m * 2^k."""
    if order < 1:
        return None
    m = order
    while m % 2 == 0:
        m //= 2
    while m <= order:
        if m in (1, 2) or _prime_below(m) is not None:
            return m
        m *= 2
    return None


def _prime_below(order: int) -> tuple[int, int] | None:
    """The prime q and the construction (1: order = q + 1, 2: order = 2 (q + 1)) behind an order of Paley's."""
    if order % 4:
        return None
    if _is_prime(order - 1):
        return order - 1, 1
    half = order // 2 - 1
    return (half, 2) if half % 4 == 1 and _is_prime(half) else None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _paley(order: int) -> Tensor:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    found = _prime_below(order)
    if found is None:
        raise RuntimeError(f"{order} is not an order of Paley's")
    q, kind = found
    # Quadratic residues: chi(a) is 1 for squares modulo q, -1 for the rest, 0 for 0.
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[torch.arange(1, q).square() % q] = 1.0
    chi[0] = 0.0
    index = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1.0
    core[1:, 0] = -1.0 if kind == 1 else 1.0
    core[1:, 1:] = chi[(index[:, None] - index[None, :]) % q]
    eye = torch.eye(q + 1, dtype=torch.float64)
    if kind == 1:
        return core + eye
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(eye, minus)
