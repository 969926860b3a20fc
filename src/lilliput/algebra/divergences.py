"""Divergences of distributions that are given by their logarithms, row by row; finite wherever the logarithms are."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum a (log a - log b), [n] of [n, m]; an event that `a` excludes adds nothing."""
    excluded = log_a == -torch.inf
    difference = torch.where(excluded, 0.0, log_a) - torch.where(excluded, 0.0, log_b)
    return (log_a.exp() * difference).sum(-1)


def mixed(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b)."""
    if share in (0.0, 1.0):
        return log_a if share else log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""
    log_m = mixed(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation, 1/2 sum |p - q|."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
