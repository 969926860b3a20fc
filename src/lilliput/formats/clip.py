"""Clip ranges that look at how the weights of a group are spread, and not at the error of rounding them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lilliput.formats import groups

BINS = 2048
_CHUNK = 1 << 20  # weights sorted at a time


def percentile(weight: Tensor, size: int, share: float) -> Tensor:
    """`weight` [out, in], float32, with each group cut to |w| at most its `share`-th percentile. 100 cuts nothing.
    `size`: inputs of a group, as in `formats.groups`."""

    def limit_of(w: Tensor) -> Tensor:
        size = w.abs()
        limit = _quantile(size, share / 100.0)
        return torch.where(limit > 0, limit, size.amax(-1))  # zeros alone are no range

    limit = _by_group(weight, size, limit_of)
    return torch.minimum(torch.maximum(weight, -limit), limit)


def divergence(weight: Tensor, size: int, levels: Tensor, steps: int) -> Tensor:
    """`weight` [out, in], float32, with its groups cut to one share of their range, chosen for each row.

    A histogram of BINS bins counts |w| over the largest of its group. For each of `steps` shares t = 1, ..., 1/steps:
    P is the histogram up to t with all beyond it in the last bin; Q is the histogram up to t with the bins of each
    level (non-negative `levels`, rising, on [0, t]) sharing their count evenly among those that are not empty; the
    share of least KL divergence of P from Q is taken, the longest among equals (Migacz 2017, TensorRT).
    """
    if size != 0:
        step = max(1, _CHUNK // max(weight.shape[1], 1))
        return torch.cat([_cut(weight[a : a + step], size, levels, steps) for a in range(0, len(weight), step)])
    return _cut(weight, size, levels, steps)


def _cut(weight: Tensor, size: int, levels: Tensor, steps: int) -> Tensor:
    peak = _by_group(weight, size, lambda w: w.abs().amax(-1))
    bins = torch.where(peak > 0, weight.abs() / peak.clamp(min=1e-38), 0.0).mul_(BINS).long().clamp_(max=BINS - 1)
    flat = (bins.reshape(1, -1) if size == 0 else bins).cpu()
    counts = torch.zeros(len(flat), BINS).scatter_add_(1, flat, torch.ones(flat.shape))
    best = torch.full((len(counts), 1), float("inf"))
    share = torch.ones(len(counts), 1)
    for step in range(steps):
        length = max(1, round(BINS * (steps - step) / steps))
        loss = _divergence(counts, length, levels.cpu() / float(levels[-1]))
        better = loss < best
        best, share = torch.where(better, loss, best), torch.where(better, length / BINS, share)
    limit = peak * share.to(weight)
    return torch.minimum(torch.maximum(weight, -limit), limit)


def _divergence(counts: Tensor, bins: int, levels: Tensor) -> Tensor:
    """KL of the clipped histogram from the one that levels can tell apart, [rows, 1]."""
    inside = counts[:, :bins]
    clipped = inside.clone()
    clipped[:, -1] += counts[:, bins:].sum(1)
    centre = (torch.arange(bins) + 0.5) / bins
    level = torch.bucketize(centre, (levels[1:] + levels[:-1]) / 2)
    histogram = torch.zeros(len(counts), len(levels)).index_add_(1, level, inside)
    filled = torch.zeros(len(counts), len(levels)).index_add_(1, level, (inside > 0).float())
    merged = (histogram / filled.clamp(min=1))[:, level] * (inside > 0)
    p = clipped / clipped.sum(1, keepdim=True).clamp(min=1e-30)
    q = merged / merged.sum(1, keepdim=True).clamp(min=1e-30)
    # A bin that only clipped weights reach has P and no Q: infinitely far, but for a floor that keeps an order.
    return torch.where(p > 0, p * (p.clamp(min=1e-30) / q.clamp(min=1e-9)).log(), 0.0).sum(1, keepdim=True)


def _by_group(weight: Tensor, size: int, of: Callable[[Tensor], Tensor]) -> Tensor:
    """`of` [rows, groups, size] to one number a group, spread over its inputs: [rows, width]."""
    rows, width = weight.shape
    if size == 0:
        return of(weight.reshape(1, 1, -1)).view(1, 1).expand(rows, width)
    out = torch.empty_like(weight)
    step = max(1, _CHUNK // max(width, 1))
    for columns, _, count in groups.pieces(width, size):
        for a in range(0, rows, step):
            part = groups.split(weight[a : a + step, columns], count)
            groups.split(out[a : a + step, columns], count).copy_(of(part).unsqueeze(-1))
    return out


def _quantile(values: Tensor, share: float) -> Tensor:
    """Linear between order statistics, over the last dimension; any length (torch.quantile stops at 2^24)."""
    at = share * (values.shape[-1] - 1)
    low = int(at)
    ordered = values.sort(-1).values
    below, above = ordered[..., low], ordered[..., min(low + 1, values.shape[-1] - 1)]
    return below + (above - below) * (at - low)
