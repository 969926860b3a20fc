"""Weights as small floats in the layouts of compressed-tensors. Names after the linear's own:

fp8 (`float-quantized`, `naive-quantized`): `weight` float8_e4m3fn [out, in], `weight_scale` [out, 1]; a scale for the
matrix is written once a row.
mxfp8: the same `weight`, `weight_scale` uint8 [out, in / 32], exponents + 127.
nvfp4, mxfp4: `weight_packed` uint8 [out, in / 2], the first of two codes in the lower half, each a sign and the bits of
a magnitude; `weight_scale` float8_e4m3fn [out, in / 16], divided by `weight_global_scale` float32 [1], or uint8
[out, in / 32].

A code of `LevelFormat` has one zero, so that no -0 is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.export import layouts
from lilliput.export.layouts import ALONE, FLOAT, MXFP4, MXFP8, NVFP4, PAIRS
from lilliput.formats.format import Stored
from lilliput.formats.levels import LevelFormat
from lilliput.formats.scales import FloatScales
from lilliput.formats.tables import FLOATS
from lilliput.parts.quantized import QuantizedPart

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

CHUNK = 1 << 20  # codes turned into bit patterns at a time


def described(form: LevelFormat, rows: int, width: int) -> Stored:
    """The tensors of a [rows, width] linear, by suffix."""
    layout = layouts.of(form, False)
    groups = 1 if form.group_size <= 0 else width // form.group_size
    payload: Stored = (
        {".weight_packed": (torch.uint8, (rows, width // 2))}
        if layout in PAIRS
        else {".weight": (torch.float8_e4m3fn, (rows, width))}
    )
    tensors = payload | {".weight_scale": (_scales(form), (rows, groups))}
    return tensors | {".weight_global_scale": (torch.float32, (1,))} if layout == NVFP4 else tensors


def packed(form: LevelFormat, part: QuantizedPart) -> dict[str, Tensor]:
    """The tensors that `described` names."""
    rows, width = part.codes.shape
    layout, scales = layouts.of(form, False), part.grid
    pairs = layout in PAIRS
    payload = torch.empty(rows, width // 2 if pairs else width, dtype=torch.uint8)
    step = max(1, CHUNK // max(width, 1))
    for a in range(0, rows, step):
        patterns = _patterns(part.codes[a : a + step], form)
        payload[a : a + step] = patterns[:, 0::2] | patterns[:, 1::2] << 4 if pairs else patterns
    scale = scales.codes.expand(rows, -1) if form.group_size == 0 else scales.codes
    if not isinstance(form.scales, FloatScales):
        scale = scale.to(torch.uint8)
    tensors = {
        ".weight_packed" if pairs else ".weight": payload if pairs else payload.view(torch.float8_e4m3fn),
        ".weight_scale": scale.contiguous().view(_scales(form)),
    }
    return tensors | {".weight_global_scale": scales.second[0].float().clone()} if layout == NVFP4 else tensors


def _patterns(codes: Tensor, form: LevelFormat) -> Tensor:
    """Sign and magnitude of codes, uint8. Magnitudes of a small float rise with their bits."""
    zero = len(form.on(codes).levels) // 2 - (1 << (form.bits - 1))
    signed = codes.to(torch.int16) - zero
    return (signed.abs() | (signed < 0).to(torch.int16) << (form.bits - 1)).to(torch.uint8)


def _scales(form: LevelFormat) -> torch.dtype:
    if isinstance(form.scales, FloatScales):
        return form.scales.dtype
    return torch.float8_e4m3fn if form.scales.name == "e4m3" else torch.uint8


def args(layout: str) -> QuantizationArgs:
    """The library's description of the weights of a layout."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(type="float", symmetric=True, **_ARGS[layout])


def kinds(scales: str) -> dict[str, Any]:
    """What the library says of scales of a kind that takes 8 bits."""
    dtype = torch.float8_e4m3fn if scales == "e4m3" else torch.uint8
    return {"scale_dtype": dtype, "zp_dtype": dtype}


_ROWS: dict[str, Any] = {"num_bits": FLOATS["e4m3"].bits, "strategy": "channel"}
_ARGS: dict[str, dict[str, Any]] = {
    FLOAT: _ROWS,
    ALONE: _ROWS,
    NVFP4: {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, **kinds("e4m3")},
    MXFP4: {"num_bits": 4, "strategy": "group", "group_size": 32, **kinds("e8m0")},
    MXFP8: {"num_bits": 8, "strategy": "group", "group_size": 32, **kinds("e8m0")},
}
