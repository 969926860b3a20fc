"""Kept weights anywhere in the matrix: their values row by row, and where they are in one bit for every weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.formats.format import CHUNK, Stored, dtype_name, dtype_of
from lilliput.parts.masked import MaskedPart
from lilliput.parts.part import Get

_BITS = 8  # weights of a byte, the first in bit 0


@dataclass(frozen=True)
class BitmaskSpec:
    """`count` weights of the matrix as values of `dtype`; every row of the mask begins at a new byte.

    The count is exact, and known before any weight is read: it is what a pruning step has been told to keep.
    """

    count: int
    dtype: torch.dtype = torch.float16

    def describe(self) -> str:
        return f"{self.count} kept weights in {dtype_name(self.dtype)}"

    def size_bits(self, rows: int, width: int) -> int:
        return self.count * self.dtype.itemsize * 8 + rows * width

    def stored(self, rows: int, width: int) -> Stored:
        return {"": (self.dtype, (self.count,)), "_mask": (torch.uint8, (rows, -(-width // _BITS)))}

    def operations(self, rows: int, width: int) -> int:
        return 0

    def add_to(self, out: Tensor, get: Get) -> None:
        rows, width = out.shape
        values, packed = get(""), get("_mask")
        step, begin = max(1, CHUNK // max(width, 1)), 0
        for a in range(0, rows, step):
            mask = unpack(packed[a : a + step], width)
            end = begin + int(mask.sum())
            spread = torch.zeros(mask.shape, dtype=out.dtype, device=out.device)
            out[a : a + step] += spread.masked_scatter_(mask, values[begin:end].to(out.dtype))
            begin = end

    def plain(self) -> dict[str, Any]:
        return {"kind": "bitmask", "count": self.count, "dtype": dtype_name(self.dtype)}


def from_plain(plain: Mapping[str, Any]) -> BitmaskSpec:
    """Undo `BitmaskSpec.plain`."""
    return BitmaskSpec(int(plain["count"]), dtype_of(plain["dtype"]))


@dataclass(frozen=True)
class BitmaskPart(MaskedPart):
    """`values` [count] of the places where `mask` [out, in] is true, in the order of the rows."""

    @property
    def spec(self) -> BitmaskSpec:
        return BitmaskSpec(len(self.values), self.dtype)

    def pack(self) -> dict[str, Tensor]:
        return {"": self.values.to(self.dtype), "_mask": pack(self.mask)}


gather = BitmaskPart.gather


def pack(mask: Tensor) -> Tensor:
    """Boolean [rows, width] to uint8 [rows, ceil(width / 8)]; the bits that are left over are 0."""
    rows, width = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -width % _BITS)).view(rows, -(-width // _BITS), _BITS)
    return (padded << torch.arange(_BITS, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, width: int) -> Tensor:
    """Undo `pack`: uint8 [rows, ceil(width / 8)] to boolean [rows, width]."""
    bits = packed.unsqueeze(-1) >> torch.arange(_BITS, dtype=torch.uint8, device=packed.device) & 1
    return bits.view(len(packed), packed.shape[1] * _BITS)[:, :width].bool()
