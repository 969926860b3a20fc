"""Codes on the grid of a format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lilliput.formats.format import CHUNK, Format, Stored
from lilliput.parts.part import Get


@dataclass(frozen=True)
class QuantizedSpec:
    """Codes of one format."""

    format: Format

    def describe(self) -> str:
        return self.format.describe()

    def size_bits(self, rows: int, width: int) -> int:
        return self.format.size_bits(rows, width)

    def stored(self, rows: int, width: int) -> Stored:
        return self.format.stored(rows, width)

    def operations(self, rows: int, width: int) -> int:
        return 0

    def add_to(self, out: Tensor, get: Get) -> None:
        rows, width = out.shape
        step = max(1, CHUNK // max(width, 1))  # few rows at a time: codes are wide while they are unpacked
        for a in range(0, rows, step):
            b = min(rows, a + step)
            out[a:b] += self.format.decode(*self.format.unpack(get, rows, width, a, b))

    def plain(self) -> dict[str, Any]:
        return self.format.plain()


@dataclass(frozen=True)
class QuantizedPart:
    """Codes (integers, output rows first) and the grid that the format's own `fit` returned."""

    format: Format
    codes: Tensor
    grid: Any

    @property
    def spec(self) -> QuantizedSpec:
        return QuantizedSpec(self.format)

    def decode(self) -> Tensor:
        return self.format.decode(self.codes, self.grid)

    def bits(self) -> int:
        rows, width = self.codes.shape
        return self.format.size_bits(rows, width)

    def pack(self) -> dict[str, Tensor]:
        return self.format.pack(self.codes, self.grid)

    def rows(self, start: int, stop: int) -> QuantizedPart:
        return replace(self, codes=self.codes[start:stop], grid=self.grid.rows(start, stop))
