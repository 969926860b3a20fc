"""Products with binary-coded weights by tables of partial sums, as LUT-GEMM computes them: nothing is decoded.

y = sum over groups of z sum_j x_j + sum_i alpha_i (B_i x). Of eight inputs there are 2^8 signed sums: they are tabled
once, and every eight weights of a bit plane, one byte, then cost one look-up instead of eight multiply-adds.

Park et al. 2022, arXiv 2206.09557.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.formats.binary import BinaryFormat, BinaryGrid
from lilliput.parts.quantized import QuantizedSpec
from lilliput.parts.scheme import Scheme

INPUTS = 8  # of one table
LOOKS = 16  # tokens times planes up to which look-ups took at most about half of the time of decoding, on a CPU


def form_of(scheme: Scheme, width: int) -> BinaryFormat | None:
    """The format of a linear that tables serve: one binary-coded part and nothing else, in groups of whole bytes."""
    if len(scheme.parts) != 1 or scheme.inputs or scheme.outputs:
        return None
    form = getattr(scheme.parts[0], "format", None) if isinstance(scheme.parts[0], QuantizedSpec) else None
    if not isinstance(form, BinaryFormat):
        return None
    size = width if form.group_size < 0 else form.group_size
    return form if size % INPUTS == 0 and width % size == 0 else None


def most(form: BinaryFormat) -> int:
    """Tokens up to which tables are quicker than a decoded weight; 0 for none."""
    return LOOKS // form.bits


def operations(form: BinaryFormat, rows: int, width: int) -> int:
    """Additions and multiplications for a token: the tables, one addition a look-up, and what groups are scaled by."""
    groups = 1 if form.group_size < 0 else width // form.group_size
    return 2 * (1 << INPUTS) * width + rows * form.bits * width // INPUTS + 2 * rows * groups * (form.bits + 1)


def tables(x: Tensor) -> Tensor:
    """The signed sums of every eight inputs: [tokens, n] (n a multiple of 8) to [tokens, n / 8, 256].

    Entry k adds input j of its eight where bit j of k is set, and subtracts it elsewhere.
    """
    numbers = torch.arange(1 << INPUTS, device=x.device)
    signs = (numbers >> torch.arange(INPUTS, device=x.device).unsqueeze(1) & 1) * 2 - 1
    return x.view(len(x), -1, INPUTS) @ signs.to(x)


def planes(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [out, n] (n a multiple of 8) as bytes of bit planes, uint8 [bits, out, n / 8]."""
    eights = (codes.short() + (1 << (bits - 1))).view(len(codes), -1, INPUTS)
    out = torch.zeros(bits, *eights.shape[:2], dtype=torch.uint8, device=codes.device)
    for i in range(bits):
        for j in range(INPUTS):
            out[i] |= ((eights[..., j] >> i & 1) << j).to(torch.uint8)
    return out


def codes_of(planes: Tensor) -> Tensor:
    """Undo `planes`: int8 [out, n]."""
    bits, rows, _ = planes.shape
    numbers = torch.arange(1 << INPUTS, device=planes.device)
    each = (numbers.unsqueeze(1) >> torch.arange(INPUTS, device=planes.device) & 1).to(torch.uint8)
    spread = each.view(torch.int64).view(-1)  # eight bits of a byte as eight bytes, which shift all at once
    out = torch.zeros(planes[0].numel(), dtype=torch.int64, device=planes.device)
    for i, plane in enumerate(planes):
        out |= spread.index_select(0, plane.reshape(-1).int()) << i
    return (out.view(torch.uint8).view(rows, -1).short() - (1 << (bits - 1))).to(torch.int8)


def matmul(x: Tensor, bit_planes: Tensor, grid: BinaryGrid) -> Tensor:
    """x WT for x [tokens, in] and the binary-coded W [out, in] with the bit planes `held`, in x's dtype: [tokens, out].

    The groups of `grid` are of whole bytes: see `form_of`.
    """
    _, rows, count = bit_planes.shape
    groups = grid.offset.shape[1]
    table = tables(x).view(len(x), -1)
    starts = torch.arange(count, dtype=torch.int32, device=x.device) << INPUTS
    out = x.view(len(x), groups, -1).sum(-1) @ grid.offset.to(x).T
    for i, plane in enumerate(bit_planes):
        sums = table.index_select(1, (plane.int() + starts).view(-1)).view(len(x), rows, groups, -1).sum(-1)
        out += (sums * grid.alpha[..., i].to(x)).sum(-1)
    return out
