"""Plain values in a float type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lilliput.formats.format import Stored, dtype_name, dtype_of
from lilliput.parts.part import Get


@dataclass(frozen=True)
class DenseSpec:
    """Plain values in `dtype`, row-major."""

    dtype: torch.dtype

    def describe(self) -> str:
        return dtype_name(self.dtype)

    def size_bits(self, rows: int, width: int) -> int:
        return rows * width * self.dtype.itemsize * 8

    def stored(self, rows: int, width: int) -> Stored:
        return {"": (self.dtype, (rows * width,))}

    def operations(self, rows: int, width: int) -> int:
        return 0

    def add_to(self, out: Tensor, get: Get) -> None:
        out += get("").view(out.shape)

    def plain(self) -> dict[str, Any]:
        return {"kind": "dense", "dtype": dtype_name(self.dtype)}


def from_plain(plain: Mapping[str, Any]) -> DenseSpec:
    """Undo `DenseSpec.plain`."""
    return DenseSpec(dtype_of(plain["dtype"]))


@dataclass(frozen=True)
class DensePart:
    """Plain values [out, in], stored in `dtype`."""

    weight: Tensor
    dtype: torch.dtype = torch.float32

    @property
    def spec(self) -> DenseSpec:
        return DenseSpec(self.dtype)

    def decode(self) -> Tensor:
        return self.weight.to(self.dtype).float()

    def bits(self) -> int:
        return self.spec.size_bits(*self.weight.shape)

    def pack(self) -> dict[str, Tensor]:
        return {"": self.weight.to(self.dtype).reshape(-1)}

    def rows(self, start: int, stop: int) -> DensePart:
        return replace(self, weight=self.weight[start:stop])
