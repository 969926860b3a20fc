"""Weights as integers in the layouts of compressed-tensors. Names after the linear's own:

`pack-quantized`, b bits: `weight_packed` int32 [out, ceil(in b / 32)], `weight_scale` [out, groups], `weight_shape`
int64 [2] and, asymmetric, `weight_zero_point` int32 [ceil(out b / 32), groups], packed along rows.
`int-quantized`, 8 bits: `weight` int8 [out, in], `weight_scale` [out, groups] and, asymmetric, `weight_zero_point` int8
of that shape.

Codes and zero points are signed. A grid per tensor is written as one scale per row, which decodes to the same values.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lilliput.export.layouts import WHOLE
from lilliput.formats.bits import pack_words
from lilliput.formats.format import Stored
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.quantized import QuantizedPart

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

CHUNK = 1 << 20  # codes packed at a time: they are widened to 64 bits, several times over


def described(form: IntegerFormat, layout: str, rows: int, width: int) -> Stored:
    """The tensors of a [rows, width] linear, by suffix."""
    groups = 1 if form.group_size <= 0 else width // form.group_size
    tensors: Stored = {".weight_scale": (form.scale_dtype, (rows, groups))}
    if layout == WHOLE:
        tensors[".weight"] = (torch.int8, (rows, width))
        zero = (torch.int8, (rows, groups))
    else:
        tensors[".weight_packed"] = (torch.int32, (rows, math.ceil(width * form.bits / 32)))
        tensors[".weight_shape"] = (torch.int64, (2,))
        zero = (torch.int32, (math.ceil(rows * form.bits / 32), groups))
    return tensors if form.symmetric else tensors | {".weight_zero_point": zero}


def packed(form: IntegerFormat, layout: str, part: QuantizedPart) -> dict[str, Tensor]:
    """The tensors that `described` names."""
    rows, width = part.codes.shape
    scale, zero = part.grid.scale, part.grid.zero
    if form.group_size == 0:
        scale, zero = scale.expand(rows, -1), None if zero is None else zero.expand(rows, -1)
    tensors = {".weight_scale": scale.to(form.scale_dtype).contiguous()}
    if layout == WHOLE:
        tensors[".weight"] = part.codes.to(torch.int8).contiguous()
        return tensors if zero is None else tensors | {".weight_zero_point": zero.to(torch.int8).contiguous()}
    step = max(1, CHUNK // width)
    words = torch.empty(rows, math.ceil(width * form.bits / 32), dtype=torch.int32)
    for start in range(0, rows, step):
        words[start : start + step] = pack_words(part.codes[start : start + step], form.bits)
    tensors |= {".weight_packed": words, ".weight_shape": torch.tensor([rows, width], dtype=torch.int64)}
    if zero is not None:
        tensors[".weight_zero_point"] = pack_words(zero.T.contiguous(), form.bits).T.contiguous()
    return tensors


def args(bits: int, symmetric: bool, group: int) -> QuantizationArgs:
    """The library's description; `group` -1: one scale per output row."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group < 0 else "group",
        group_size=None if group < 0 else group,
    )
