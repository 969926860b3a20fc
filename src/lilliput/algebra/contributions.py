"""What groups of hidden channels add to the output of a linear: |sum of d_j h_j over the channels j of a group|."""

from __future__ import annotations

import torch
from torch import Tensor


def grams(down: Tensor, group_size: int) -> Tensor:
    """D_g^T D_g of the columns of each group of a weight [out, width], float32 [groups, size, size]; a last group that
    is shorter is filled with zeros."""
    out, width = down.shape
    groups = -(-width // group_size)
    padded = torch.nn.functional.pad(down.float(), (0, groups * group_size - width))
    cut = padded.view(out, groups, group_size).permute(1, 0, 2)
    return cut.transpose(1, 2) @ cut


def norms(hidden: Tensor, gram: Tensor) -> Tensor:
    """sqrt(h_g^T G_g h_g) of each group, float32 [n, groups]; hidden [n, width]."""
    groups, size = gram.shape[:2]
    padded = torch.nn.functional.pad(hidden.float(), (0, groups * size - hidden.shape[1]))
    cut = padded.view(-1, groups, size).transpose(0, 1)
    return (cut @ gram * cut).sum(-1).clamp_(min=0.0).sqrt_().T.contiguous()
