"""The types of ggml, and the bytes of their blocks: what engines that read GGUF files compute with.

A row is cut into blocks of 32 or 256 weights. A weight is value = scale * code + offset, computed in float32 with one
rounding; a super-block of 256 has sub-blocks of 16 or 32 weights whose scales (and offsets) are integers of 4, 6 or 8
bits times a float16 that the block shares. Bits of the codes lie in planes: a plane holds `bits` bits of each code,
8 / bits codes to a byte, and codes that share a byte are `run` apart.

Source: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/llama.cpp; the values are those of
`gguf.quants.dequantize`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # levels of iq4_nl and iq4_xs
_POWERS = (1, 3, 9, 27, 81)


@dataclass(frozen=True)
class Kind:
    """One type.

    block: weights in a block; group: weights that share a scale; lowest, highest: of a code (of a table: its indices);
    fields: what a block holds, in order; planes: of the codes' bits above `lowest`, as (shift, bits, run), by field;
    scales: smallest and largest code of a sub-block's scale, None where each block has a float16; offset: "" none,
    "float16" one a block, "code" integers times a float16 to be subtracted; table: levels in place of whole numbers;
    narrow: the type that takes the place of this one in rows that its blocks do not divide.
    """

    block: int
    group: int
    lowest: int
    highest: int
    fields: tuple[str, ...]
    planes: Mapping[str, tuple[int, int, int]]
    scales: tuple[int, int] | None = None
    offset: str = ""
    table: tuple[int, ...] = ()
    narrow: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return sum(self.size(x) for x in self.fields)

    @property
    def groups(self) -> int:
        """Groups in a block."""
        return self.block // self.group

    def size(self, field: str) -> int:
        """Bytes of a field."""
        if field in self.planes:
            return self.block * self.planes[field][1] // 8
        return {"d": 2, "m": 2, "scales": self.groups, "s3": 12, "s4": 12, "xs": 6, "trits": 52, "int8": 32}[field]


_NIBBLES = {"low": (0, 4, 16)}
_FIVE = {"low": (0, 4, 16), "high": (4, 1, 1)}
_PAIRS = {"low": (0, 2, 32)}
_WIDE = {"low": (0, 4, 32)}

KINDS: Mapping[str, Kind] = {
    "q4_0": Kind(32, 32, -8, 7, ("d", "low"), _NIBBLES),
    "q4_1": Kind(32, 32, 0, 15, ("d", "m", "low"), _NIBBLES, offset="float16"),
    "q5_0": Kind(32, 32, -16, 15, ("d", "high", "low"), _FIVE),
    "q5_1": Kind(32, 32, 0, 31, ("d", "m", "high", "low"), _FIVE, offset="float16"),
    "q8_0": Kind(32, 32, -127, 127, ("d", "int8"), {}),
    "iq4_nl": Kind(32, 32, 0, 15, ("d", "low"), _NIBBLES, table=UNEVEN),
    "q2_k": Kind(256, 16, 0, 3, ("scales", "low", "d", "m"), _PAIRS, (1, 15), "code", narrow="iq4_nl"),
    "q3_k": Kind(
        256, 16, -4, 3, ("high", "low", "s3", "d"), {**_PAIRS, "high": (2, 1, 32)}, (-32, 31), narrow="iq4_nl"
    ),
    "q4_k": Kind(256, 32, 0, 15, ("d", "m", "s4", "low"), _WIDE, (1, 63), "code", narrow="q5_0"),
    "q5_k": Kind(
        256, 32, 0, 31, ("d", "m", "s4", "high", "low"), {**_WIDE, "high": (4, 1, 32)}, (1, 63), "code", narrow="q5_1"
    ),
    "q6_k": Kind(
        256,
        16,
        -32,
        31,
        ("low", "high", "scales", "d"),
        {"low": (0, 4, 64), "high": (4, 2, 32)},
        (-128, 127),
        narrow="q8_0",
    ),
    "iq4_xs": Kind(256, 32, 0, 15, ("d", "xs", "low"), _NIBBLES, (-32, 31), table=UNEVEN, narrow="iq4_nl"),
    "tq1_0": Kind(256, 256, -1, 1, ("trits", "d"), {}, narrow="q4_0"),
    "tq2_0": Kind(256, 256, -1, 1, ("low", "d"), _PAIRS, narrow="q4_0"),
}


@dataclass(frozen=True)
class Blocks:
    """What the blocks of some rows hold: codes int8 [rows, in]; d and m float16 [rows, blocks]; scales and minima int16
    [rows, groups], None where the type has none."""

    codes: Tensor
    d: Tensor
    m: Tensor | None = None
    scales: Tensor | None = None
    minima: Tensor | None = None


def pack(kind: Kind, content: Blocks) -> Tensor:
    """The bytes of blocks, uint8 [rows, bytes of a row]."""
    rows = len(content.d)
    count = content.d.numel()
    codes = (content.codes.reshape(count, kind.block).to(torch.int16) - kind.lowest).to(torch.uint8)
    scales = None if content.scales is None else content.scales.reshape(count, -1)
    minima = None if content.minima is None else content.minima.reshape(count, -1)
    parts = [_field(kind, x, content, codes, scales, minima) for x in kind.fields]
    return torch.cat(parts, 1).view(rows, -1)


def _field(
    kind: Kind, field: str, content: Blocks, codes: Tensor, scales: Tensor | None, minima: Tensor | None
) -> Tensor:
    if field in kind.planes:
        return _plane(codes, *kind.planes[field])
    if field == "int8":
        return content.codes.reshape(len(codes), -1).contiguous().view(torch.uint8)
    if field == "trits":
        return _trits(codes)
    if field in ("d", "m"):
        value = content.d if field == "d" else content.m
        assert value is not None  # by the kind's fields
        return value.contiguous().view(torch.uint8).view(-1, 2)
    assert scales is not None
    if field == "scales":
        return (scales & 0xFF).to(torch.uint8) if minima is None else (scales | minima << 4).to(torch.uint8)
    if field == "s3":
        return torch.cat((_plane(scales + 32, 0, 4, 8), _plane(scales + 32, 4, 2, 4)), 1)
    if field == "xs":
        high = _plane(scales + 32, 4, 2, 1)
        return torch.cat((high, _plane(scales + 32, 0, 4, 1)), 1)
    assert minima is not None
    first = [x[:, :4] | (x[:, 4:] >> 4) << 6 for x in (scales, minima)]
    return torch.cat((*first, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4), 1).to(torch.uint8)


def unpack(kind: Kind, data: Tensor) -> Blocks:
    """Undo `pack`: uint8 [rows, bytes of a row]."""
    rows = len(data)
    blocks = data.reshape(-1, kind.bytes)
    parts = dict(zip(kind.fields, torch.split(blocks, [kind.size(x) for x in kind.fields], 1), strict=True))
    if "int8" in parts:
        codes = parts["int8"].contiguous().view(torch.int8)
    else:
        if "trits" in parts:
            unsigned = _untrits(parts["trits"])
        else:
            shifted = [_unplane(parts[x], bits, run) << shift for x, (shift, bits, run) in kind.planes.items()]
            unsigned = sum(shifted[1:], shifted[0])
        codes = (unsigned.to(torch.int16) + kind.lowest).to(torch.int8)
    d, m = (parts[x].contiguous().view(torch.float16).view(rows, -1) if x in parts else None for x in ("d", "m"))
    assert d is not None  # all kinds have one
    scales, minima = _scales(kind, parts)
    return Blocks(
        codes.reshape(rows, -1),
        d,
        m,
        None if scales is None else scales.reshape(rows, -1),
        None if minima is None else minima.reshape(rows, -1),
    )


def _scales(kind: Kind, parts: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    if "scales" in parts:
        raw = parts["scales"].contiguous()
        if kind.offset:
            return (raw & 15).to(torch.int16), (raw >> 4).to(torch.int16)
        return raw.view(torch.int8).to(torch.int16), None
    if "s3" in parts:
        low, high = torch.split(parts["s3"], [8, 4], 1)
        return (_unplane(low, 4, 8) | _unplane(high, 2, 4) << 4).to(torch.int16) - 32, None
    if "xs" in parts:
        high, low = torch.split(parts["xs"], [2, 4], 1)
        return (_unplane(low, 4, 1) | _unplane(high, 2, 1) << 4).to(torch.int16) - 32, None
    if "s4" in parts:
        d, m, both = (x.to(torch.int16) for x in torch.split(parts["s4"], 4, 1))
        scales = torch.cat((d & 63, both & 15 | (d >> 2) & 48), 1)
        return scales, torch.cat((m & 63, both >> 4 | (m >> 2) & 48), 1)
    return None, None


def _plane(codes: Tensor, shift: int, bits: int, run: int) -> Tensor:
    """Bits [shift, shift + bits) of codes [blocks, n], those `run` apart in one byte: uint8 [blocks, n * bits / 8]."""
    per = 8 // bits
    part = (codes >> shift).to(torch.uint8) & ((1 << bits) - 1)
    part = part.view(len(codes), -1, per, run) << (torch.arange(per, dtype=torch.uint8) * bits).view(1, 1, per, 1)
    return part.sum(2, dtype=torch.uint8).view(len(codes), -1)


def _unplane(data: Tensor, bits: int, run: int) -> Tensor:
    """Undo `_plane`, uint8 [blocks, n]."""
    per = 8 // bits
    shifts = (torch.arange(per, dtype=torch.uint8) * bits).view(1, 1, per, 1)
    return (data.reshape(len(data), -1, 1, run) >> shifts & ((1 << bits) - 1)).view(len(data), -1)


def _trits(codes: Tensor) -> Tensor:
    """256 numbers of 0..2 in 52 bytes: five to a byte as a fraction of 3^5, and the last 16 four to a byte."""
    count = len(codes)
    first, second, last = torch.split(codes.to(torch.int32), [160, 80, 16], 1)
    weigh = torch.tensor(_POWERS[::-1], dtype=torch.int32).view(1, 5, 1)
    sums = [(x.reshape(count, 5, -1) * weigh).sum(1) for x in (first, second)]
    sums.append((last.reshape(count, 4, 4) * weigh[:, :4]).sum(1))
    return ((torch.cat(sums, 1) * 256 + 242) // 243).to(torch.uint8)


def _untrits(data: Tensor) -> Tensor:
    count = len(data)
    first, second, last = torch.split(data.to(torch.int32), [32, 16, 4], 1)
    weigh = torch.tensor(_POWERS, dtype=torch.int32).view(1, 5, 1)
    pieces = [(x.unsqueeze(1) * weigh & 255).view(count, -1) for x in (first, second)]
    pieces.append((last.unsqueeze(1) * weigh[:, :4] & 255).view(count, -1))
    return (torch.cat(pieces, 1) * 3 >> 8).to(torch.uint8)
