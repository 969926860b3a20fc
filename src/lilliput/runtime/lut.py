"""Products with binary-coded weights by tables of partial sums, as LUT-GEMM computes them; a reference for kernels.

y = sum over groups of z sum_j x_j + sum_i alpha_i (B_i x). Of eight inputs there are 2^8 signed sums: they are tabled
once, and every eight weights of a bit plane, one byte, then cost one look-up instead of eight multiply-adds.

Park et al. 2022, arXiv 2206.09557.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lilliput.formats.binary import BinaryFormat, Grid

INPUTS = 8  # of one table


def tables(x: Tensor) -> Tensor:
    """The signed sums of every eight inputs: [tokens, n] (n a multiple of 8) to [tokens, n / 8, 256].

    Entry k adds input j of its eight where bit j of k is set, and subtracts it elsewhere.
    """
    numbers = torch.arange(1 << INPUTS, device=x.device)
    signs = (numbers >> torch.arange(INPUTS, device=x.device).unsqueeze(1) & 1) * 2 - 1
    return x.view(len(x), -1, INPUTS) @ signs.to(x)


def planes(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [out, n] (n a multiple of 8) as bytes of bit planes, int64 [bits, out, n / 8]."""
    unsigned = codes.long() + (1 << (bits - 1))
    split = torch.stack([unsigned >> i & 1 for i in range(bits)])
    powers = 1 << torch.arange(INPUTS, device=codes.device)
    return (split.view(bits, len(codes), -1, INPUTS) * powers).sum(-1)


def matmul(x: Tensor, form: BinaryFormat, codes: Tensor, grid: Grid) -> Tensor:
    """x WT for x [tokens, in] and the binary-coded W [out, in], in x's dtype: [tokens, out].

    Groups are filled up with zero inputs to multiples of eight.
    """
    rows, width = codes.shape
    size = width if form.group_size < 0 else min(form.group_size, width)

    def units(t: Tensor) -> Tensor:
        whole = pad(t, (0, -width % size)).view(len(t), -1, size)
        return pad(whole, (0, -size % INPUTS))

    inputs = units(x)
    held = units(codes)
    groups = held.shape[1]
    table = tables(inputs.reshape(len(x), -1))
    out = inputs.sum(-1) @ grid.offset.to(x).T
    place = torch.arange(table.shape[1], device=x.device)
    for i, plane in enumerate(planes(held.reshape(rows, -1), form.bits)):
        sums = table[:, place, plane].view(len(x), rows, groups, -1).sum(-1)
        out += (sums * grid.alpha[..., i].to(x)).sum(-1)
    return out
