"""Parts: the terms of a compressed linear layer. Each decodes to float32 [out, in] and knows its exact size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lilliput.formats.integer import Grid, IntegerFormat


@dataclass(frozen=True)
class DensePart:
    """Plain values [out, in], stored in `dtype`."""

    weight: Tensor
    dtype: torch.dtype = torch.float32

    def decode(self) -> Tensor:
        return self.weight.to(self.dtype).float()

    def bits(self) -> int:
        return self.weight.numel() * self.dtype.itemsize * 8

    def rows(self, start: int, stop: int) -> DensePart:
        return replace(self, weight=self.weight[start:stop])


@dataclass(frozen=True)
class QuantizedPart:
    """Integer codes [out, in] (int8) on a grid."""

    format: IntegerFormat
    codes: Tensor
    grid: Grid

    def decode(self) -> Tensor:
        return self.format.decode(self.codes, self.grid)

    def bits(self) -> int:
        rows, width = self.codes.shape
        return self.format.size_bits(rows, width)

    def rows(self, start: int, stop: int) -> QuantizedPart:
        return replace(self, codes=self.codes[start:stop], grid=self.grid.rows(start, stop))


@dataclass(frozen=True)
class LowRankPart:
    """left [out, rank] times right [rank, in], stored in `dtype`."""

    left: Tensor
    right: Tensor
    dtype: torch.dtype = torch.float16

    def decode(self) -> Tensor:
        return self.left.to(self.dtype).float() @ self.right.to(self.dtype).float()

    def bits(self) -> int:
        return (self.left.numel() + self.right.numel()) * self.dtype.itemsize * 8

    def rows(self, start: int, stop: int) -> LowRankPart:
        return replace(self, left=self.left[start:stop])


Part = DensePart | QuantizedPart | LowRankPart
