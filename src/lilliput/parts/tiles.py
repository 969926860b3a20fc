"""Few kept weights anywhere in the matrix, tile by tile: each value with its place within its tile in 16 bits.

The tiles of Flash-LLM (Xia et al. 2023, arXiv 2309.10285), which a kernel decodes one by one into fast memory. Against
a bit for every weight they take 16 bits for each kept one, and so fewer bytes where less than one in 16 is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.formats.format import Stored, dtype_name, dtype_of
from lilliput.parts.masked import MaskedPart
from lilliput.parts.part import Get

HIGH, WIDE = 128, 64  # rows and inputs of a tile; those at the edges are smaller


@dataclass(frozen=True)
class TilesSpec:
    """`count` weights of the matrix as values of `dtype`, in the order of the tiles, row after row of them, and within
    a tile by rows. The count is exact, as that of `BitmaskSpec`."""

    count: int
    dtype: torch.dtype = torch.float16

    def describe(self) -> str:
        return f"{self.count} kept weights in {dtype_name(self.dtype)} by tiles"

    def size_bits(self, rows: int, width: int) -> int:
        return 8 * (self.count * (self.dtype.itemsize + 2) + 4 * (_tiles(rows, width) + 1))

    def stored(self, rows: int, width: int) -> Stored:
        return {
            "": (self.dtype, (self.count,)),
            "_place": (torch.uint16, (self.count,)),
            "_tile": (torch.int32, (_tiles(rows, width) + 1,)),
        }

    def operations(self, rows: int, width: int) -> int:
        return 0

    def add_to(self, out: Tensor, get: Get) -> None:
        width, begins = out.shape[1], get("_tile").long()
        tile = torch.repeat_interleave(torch.arange(len(begins) - 1, device=out.device), begins.diff())
        place, across = get("_place").long(), max(1, -(-width // WIDE))
        row, column = tile // across * HIGH + place // WIDE, tile % across * WIDE + place % WIDE
        out.index_put_((row, column), get("").to(out.dtype), accumulate=True)

    def plain(self) -> dict[str, Any]:
        return {"kind": "tiles", "count": self.count, "dtype": dtype_name(self.dtype)}


def _tiles(rows: int, width: int) -> int:
    return -(-rows // HIGH) * -(-width // WIDE)


def from_plain(plain: Mapping[str, Any]) -> TilesSpec:
    """Undo `TilesSpec.plain`."""
    return TilesSpec(int(plain["count"]), dtype_of(plain["dtype"]))


@dataclass(frozen=True)
class TilesPart(MaskedPart):
    """`values` [count] of the places where `mask` [out, in] is true, in the order of the rows of the matrix."""

    @property
    def spec(self) -> TilesSpec:
        return TilesSpec(len(self.values), self.dtype)

    def pack(self) -> dict[str, Tensor]:
        rows, width = self.mask.shape
        row, column = self.mask.nonzero().unbind(1)
        tile = row // HIGH * max(1, -(-width // WIDE)) + column // WIDE
        order = (tile * HIGH * WIDE + row % HIGH * WIDE + column % WIDE).argsort()
        begins = torch.zeros(_tiles(rows, width) + 1, dtype=torch.int32, device=row.device)
        begins[1:] = torch.bincount(tile, minlength=_tiles(rows, width)).cumsum(0)
        place = (row % HIGH * WIDE + column % WIDE)[order]
        return {"": self.values.to(self.dtype)[order], "_place": place.to(torch.uint16), "_tile": begins}


gather = TilesPart.gather
