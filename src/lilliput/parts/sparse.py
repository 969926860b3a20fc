"""Few weights anywhere in the matrix, by compressed sparse rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lilliput.algebra.masks import largest
from lilliput.formats.format import Stored, dtype_name, dtype_of
from lilliput.parts.part import Get


def column_dtype(width: int) -> torch.dtype:
    """Column numbers take 16 bits where they fit."""
    return torch.uint16 if width <= 1 << 16 else torch.int32


@dataclass(frozen=True)
class SparseSpec:
    """A share of all weights, as values of `dtype` with their column; every row's begin is stored.

    The number is fixed by the share, so that a file's size is known before the weights are.
    """

    share: float
    dtype: torch.dtype = torch.float16

    def count(self, rows: int, width: int) -> int:
        """Stored weights of a [rows, width] matrix."""
        return min(rows * width, round(self.share * rows * width))

    def describe(self) -> str:
        return f"{self.share:.2%} sparse {dtype_name(self.dtype)}"

    def size_bits(self, rows: int, width: int) -> int:
        return sum(dtype.itemsize * 8 * shape[0] for dtype, shape in self.stored(rows, width).values())

    def stored(self, rows: int, width: int) -> Stored:
        count = self.count(rows, width)
        return {
            "": (self.dtype, (count,)),
            "_column": (column_dtype(width), (count,)),
            "_row": (torch.int32, (rows + 1,)),
        }

    def operations(self, rows: int, width: int) -> int:
        return 0

    def add_to(self, out: Tensor, get: Get) -> None:
        row = get("_row").long()
        index = torch.repeat_interleave(torch.arange(len(row) - 1, device=out.device), row.diff())
        out.index_put_((index, get("_column").long()), get("").to(out.dtype), accumulate=True)

    def plain(self) -> dict[str, Any]:
        return {"kind": "sparse", "share": self.share, "dtype": dtype_name(self.dtype)}


def from_plain(plain: Mapping[str, Any]) -> SparseSpec:
    """Undo `SparseSpec.plain`."""
    return SparseSpec(float(plain["share"]), dtype_of(plain["dtype"]))


@dataclass(frozen=True)
class SparsePart:
    """`values` [count] at `columns` int64 [count], in the order of the rows; row i's are [row[i], row[i + 1])."""

    share: float
    values: Tensor
    columns: Tensor
    row: Tensor
    width: int
    dtype: torch.dtype = torch.float16

    @property
    def spec(self) -> SparseSpec:
        return SparseSpec(self.share, self.dtype)

    def decode(self) -> Tensor:
        out = torch.zeros(len(self.row) - 1, self.width, device=self.values.device)
        self.spec.add_to(out, self.pack().__getitem__)
        return out

    def bits(self) -> int:
        each = self.dtype.itemsize + column_dtype(self.width).itemsize
        return 8 * (len(self.values) * each + 4 * len(self.row))

    def pack(self) -> dict[str, Tensor]:
        return {
            "": self.values.to(self.dtype),
            "_column": self.columns.to(column_dtype(self.width)),
            "_row": self.row.to(torch.int32),
        }

    def rows(self, start: int, stop: int) -> SparsePart:
        a, b = int(self.row[start]), int(self.row[stop])
        row = self.row[start : stop + 1] - self.row[start]
        share = (b - a) / max((stop - start) * self.width, 1)  # of these rows alone: another than that of the whole
        return replace(self, share=share, values=self.values[a:b], columns=self.columns[a:b], row=row)


def gather(weight: Tensor, score: Tensor, share: float, dtype: torch.dtype = torch.float16) -> SparsePart:
    """The weights [out, in] of the highest `score` [out, in], exactly the share's number of them.

    Among equal scores the first by row and column is taken.
    """
    return pick(weight, highest(score, share), share, dtype)


def highest(score: Tensor, share: float) -> Tensor:
    """Boolean mask [out, in] of the highest scores, exactly the share's number of them; among equals the first.

    Raises LilliputError for scores that are NaN or infinite.
    """
    count = SparseSpec(share).count(*score.shape)
    return largest(score.reshape(1, -1), count).view(score.shape)


def pick(weight: Tensor, mask: Tensor, share: float, dtype: torch.dtype = torch.float16) -> SparsePart:
    """The weights [out, in] of `mask`, which has exactly the share's number of them (ValueError otherwise)."""
    rows, width = weight.shape
    places = mask.reshape(-1).nonzero().squeeze(1)
    if len(places) != SparseSpec(share).count(rows, width):
        raise ValueError(f"{len(places)} weights are no share of {share} of {rows} x {width}")
    row = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
    row[1:] = torch.bincount(places // width, minlength=rows).cumsum(0)
    return SparsePart(share, weight.reshape(-1)[places], places % width, row, width, dtype)
