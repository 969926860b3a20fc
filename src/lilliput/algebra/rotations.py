"""Orthogonal matrices: random ones to start from, and steps that stay among them."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonal(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix [width, width], float64, uniform over all of them."""
    rng = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=rng, dtype=torch.float64))
    out: Tensor = q * r.diagonal().sign()
    return out


def cayley(rotation: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """One descent step of length `rate` on the orthogonal matrices, all float64 [n, n].

    With G = dL/dR, A = G RT - 1/2 R RT G RT and the skew Y = A - AT: R <- (I + a/2 Y)^-1 (I - a/2 Y) R, which is
    orthogonal for every a. a = min(rate, 1 / |Y|_1) keeps the linear part of the step small (Li et al. 2020,
    arXiv 2002.01113).
    """
    half = gradient @ rotation.T
    half = half - 0.5 * rotation @ (rotation.T @ half)
    skew = half - half.T
    size = float(skew.abs().sum(0).max())
    step = rate if size == 0.0 else min(rate, 1.0 / size)
    eye = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    out: Tensor = torch.linalg.solve(eye + (step / 2) * skew, rotation - (step / 2) * (skew @ rotation))
    return out


def principal(gram: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix as columns, float64, largest eigenvalue first, each with a fixed sign."""
    vectors = torch.linalg.eigh(gram.double()).eigenvectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    signed: Tensor = vectors * largest.sign()
    return signed


def turned(value: Tensor, places: Tensor, matrices: Tensor, axis: int) -> Tensor:
    """A matrix [out, in] or vector [out] whose stretches of entries along an axis, `places` int64 [n, h], are
    multiplied by `matrices` [n, h, h], as rows of vectors; what lies in none stays."""
    across = axis == 0 and value.dim() == 2
    rows = value.T if across else value
    picked = rows[..., places.flatten()].reshape(*rows.shape[:-1], *places.shape)  # [.., n, h]
    out = rows.clone()
    out[..., places.flatten()] = torch.einsum("...nh,nhk->...nk", picked, matrices.to(value)).flatten(-2)
    return out.T if across else out
