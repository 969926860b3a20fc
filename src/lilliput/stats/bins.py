"""Histograms of the sizes of inputs, by channel: two bins for each power of two from 2^-20 to 2^12; what is smaller or
larger, 0 too, is in the first or last bin."""

from __future__ import annotations

import torch
from torch import Tensor

COUNT = 64
_FINE, _LOWEST = 2, -20
_ROOM = 1 << 20  # inputs that are looked at together


def counts(x: Tensor) -> Tensor:
    """How many of the inputs float32 [tokens, width] are in each bin: float32 [width, COUNT].

    A channel whose inputs are not all finite has NaN in every bin.
    """
    width = x.shape[1]
    first = COUNT * torch.arange(width, device=x.device)
    seen = torch.zeros(COUNT * width, dtype=torch.int64, device=x.device)
    step = max(1, _ROOM // width)
    for a in range(0, len(x), step):
        place = (
            x[a : a + step]
            .abs()
            .log2_()
            .sub_(_LOWEST)
            .mul_(_FINE)
            .nan_to_num_(0.0)
            .clamp_(0, COUNT - 1)
            .long()
            .add_(first)
        )
        seen += torch.bincount(place.flatten(), minlength=COUNT * width)
    return seen.view(width, COUNT).float() + (x.sum(0) * 0.0)[:, None]


def edges(device: torch.device | str = "cpu") -> Tensor:
    """Where the bins begin and end, float64 [COUNT + 1]; the first begins at 0."""
    ends: Tensor = torch.exp2(torch.arange(COUNT + 1, dtype=torch.float64, device=device) / _FINE + _LOWEST)
    ends[0] = 0.0
    return ends


def scaled(histogram: Tensor, factor: Tensor) -> Tensor:
    """The histogram of x * factor (factor: [width]), moved by the nearest number of bins; the first bin, where 0 is,
    stays."""
    shift = (factor.abs().float().log2() * _FINE).round().clamp(-COUNT, COUNT).long()
    place = torch.arange(COUNT, device=histogram.device) + shift[:, None]
    place[:, 0] = 0
    return torch.zeros_like(histogram).scatter_add_(1, place.clamp(0, COUNT - 1), histogram)


def entropy(histogram: Tensor) -> Tensor:
    """In nats, float32 [width]: -sum of p ln p over the bins; 0 for a channel that was never seen."""
    share = histogram.double() / histogram.double().sum(1, keepdim=True).clamp(min=1.0)
    terms: Tensor = torch.special.entr(share)
    return terms.sum(1).float()
