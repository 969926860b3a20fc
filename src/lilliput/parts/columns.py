"""Whole columns of a weight in a float type: inputs that are too important for a grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lilliput.formats.format import Stored, dtype_name, dtype_of
from lilliput.parts.part import Get


@dataclass(frozen=True)
class ColumnsSpec:
    """`count` columns with values of `dtype`."""

    count: int
    dtype: torch.dtype = torch.float16

    def describe(self) -> str:
        return f"{self.count} columns {dtype_name(self.dtype)}"

    def size_bits(self, rows: int, width: int) -> int:
        return self.count * (rows * self.dtype.itemsize + 4) * 8

    def stored(self, rows: int, width: int) -> Stored:
        return {"": (self.dtype, (rows * self.count,)), "_column": (torch.int32, (self.count,))}

    def operations(self, rows: int, width: int) -> int:
        return 0

    def add_to(self, out: Tensor, get: Get) -> None:
        out.index_add_(1, get("_column").long(), get("").view(len(out), self.count).to(out.dtype))

    def plain(self) -> dict[str, Any]:
        return {"kind": "columns", "count": self.count, "dtype": dtype_name(self.dtype)}


def from_plain(plain: Mapping[str, Any]) -> ColumnsSpec:
    """Undo `ColumnsSpec.plain`."""
    return ColumnsSpec(int(plain["count"]), dtype_of(plain["dtype"]))


@dataclass(frozen=True)
class ColumnsPart:
    """`values` [out, count] of the inputs `columns` int64 [count]; all others are 0 of `width` inputs."""

    values: Tensor
    columns: Tensor
    width: int
    dtype: torch.dtype = torch.float16

    @property
    def spec(self) -> ColumnsSpec:
        return ColumnsSpec(len(self.columns), self.dtype)

    def decode(self) -> Tensor:
        out = torch.zeros(len(self.values), self.width, device=self.values.device)
        out[:, self.columns] = self.values.to(self.dtype).float()
        return out

    def bits(self) -> int:
        return self.spec.size_bits(len(self.values), self.width)

    def pack(self) -> dict[str, Tensor]:
        return {"": self.values.to(self.dtype).reshape(-1), "_column": self.columns.to(torch.int32)}

    def rows(self, start: int, stop: int) -> ColumnsPart:
        return replace(self, values=self.values[start:stop])
