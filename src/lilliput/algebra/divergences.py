"""Divergences of distributions that are given by their logarithms, row by row; finite wherever the logarithms are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _Others(torch.autograd.Function):
    """Some logits of each row, and log sum exp of all others."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        named = logits.gather(1, ids)
        shares = logits.clone().scatter_(1, ids, -torch.inf)
        largest = shares.amax(1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
        total = shares.sub_(largest).exp_().sum(1, keepdim=True)
        ctx.save_for_backward(shares, total, ids)
        return named, (total.log() + largest)[:, 0]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        shares, total, ids = ctx.saved_tensors
        by_named, by_others = slopes
        return (shares * (by_others[:, None] / total)).scatter_(1, ids, by_named), None


def bucketed(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [n, m + 1] of the tokens ids int64 [n, m], each once, and of all others together, from logits
    [n, V]; others have to be there."""
    named, others = _Others.apply(logits, ids)  # type: ignore[no-untyped-call]
    return torch.cat([named, others[:, None]], 1).log_softmax(-1)


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
