"""Integer grids of 2..8 bits (placeholder until the formats room is filled; the signatures hold)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Scales [out, groups] in the format's scale dtype and zero points int8-range [out, groups] (None: symmetric)."""

    scale: Tensor
    zero: Tensor | None

    def rows(self, start: int, stop: int) -> Grid: ...


@dataclass(frozen=True)
class IntegerFormat:
    bits: int
    symmetric: bool
    group_size: int  # -1: one per output row; 0: one for the tensor; else that many inputs, the last group shorter
    scale_dtype: torch.dtype

    def decode(self, codes: Tensor, grid: Grid) -> Tensor: ...
    def size_bits(self, rows: int, width: int) -> int: ...
