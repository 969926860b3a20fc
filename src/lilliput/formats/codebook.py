"""Codebooks: 2^b levels of any value, for the whole matrix, for each output row, or for each group of inputs.

A code counts the levels of its unit in ascending order, from -2^(b-1) on; its value is that level, stored in a float
type to which it is rounded before anything is quantized. Nothing is padded: where the group size does not divide the
width, the last group of each row is shorter. The tables count: 2^b levels of 16 bits add 16 * 2^b / n bits to each of a
unit's n weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats import groups, kmeans
from lilliput.formats.bits import row_bytes, unpack_bits
from lilliput.formats.format import CHUNK, Family, Format, RangeRule, Stored, dtype_name, dtype_of
from lilliput.formats.integer import SCALE_DTYPES, group_of, pack_codes, scale_dtype_of
from lilliput.machine.cost import Cost
from lilliput.target import Target


@dataclass(frozen=True)
class Table:
    """The levels of a matrix: [out, groups, 2^b] in the format's dtype, ascending; [1, 1, 2^b] for one per tensor."""

    levels: Tensor

    def rows(self, start: int, stop: int) -> Table:
        """The levels of output rows [start, stop); a table per tensor serves all rows."""
        return self if self.levels.shape[:2] == (1, 1) else Table(self.levels[start:stop])


@dataclass(frozen=True)
class CodebookFormat(Format):
    """2^bits levels. `group_size`: -1 one table per output row, 0 one per tensor, else inputs per group.

    Raises PlanError for bits outside 1..8, a group size below -1 or a dtype that is not a float of 16 or 32 bits.
    """

    bits: int
    group_size: int
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise PlanError(f"{self.bits} bits: codebooks have 1 to 8 bits; choose one of those")
        if self.group_size < -1:
            raise PlanError(f"group size {self.group_size}: give a positive number, 0 (per tensor) or -1 (per row)")
        if self.dtype not in SCALE_DTYPES:
            raise PlanError(f"levels in {self.dtype}: choose float16, bfloat16 or float32")

    @property
    def levels(self) -> int:
        """Levels of a unit."""
        return 1 << self.bits

    def describe(self) -> str:
        """For tables: "codebook3 row"."""
        return f"codebook{self.bits} {({-1: 'row', 0: 'tensor'}).get(self.group_size, f'g{self.group_size}')}"

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size: codes and tables."""
        units = math.prod(groups.units(rows, width, self.group_size))
        return rows * width * self.bits + units * self.levels * self.dtype.itemsize * 8

    def cost(self, rows: int, width: int) -> Cost:
        """Fitting the tables of a [rows, width] matrix."""
        return Cost(ram=kmeans.scratch(rows * width if self.group_size == 0 else width, rows * width))

    def check(self, rows: int, width: int) -> None:
        """Raises PlanError where a unit of a [rows, width] matrix has fewer weights than its table has levels."""
        size = {0: rows * width, -1: width}.get(self.group_size, min(self.group_size, width))
        if self.levels > size:
            fits = max(size, 1).bit_length() - 1
            raise PlanError(
                f"a table of {self.levels} levels for every {size} weights: a codebook must be smaller than "
                "its data; choose "
                + (f"at most {fits} bits, or " if fits else "")
                + "a table for more weights (group_size: a larger number, channel or tensor)"
            )

    def fit(self, weight: Tensor, *, importance: Tensor | None = None, zero: Tensor | None = None) -> Table:
        """The table of least weighted squared error that k-means finds for `weight` [out, in].

        `importance` [in] or [out, in] is not negative; None, or nothing but zeros in a unit, counts all alike. `zero`,
        bool [out, in]: weights that have to be exactly 0, so that every unit which holds one has 0 among its levels.
        Raises LilliputError for NaN or infinity in the weight or importance, and for a level above the dtype.
        """
        rows, width = weight.shape
        weight = weight.float()
        if importance is not None:
            importance = importance.to(weight)
            if importance.shape not in ((width,), (rows, width)):
                raise ValueError(f"importance {tuple(importance.shape)} does not fit a weight {tuple(weight.shape)}")
            if not bool(torch.isfinite(importance.sum())):
                raise LilliputError(
                    "the importance of the weights contains NaN or infinity: check the calibration data"
                )
            importance = importance.expand(rows, width)
        if not bool(torch.isfinite(weight).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise LilliputError(f"the weight contains {bad} values that are NaN or infinite: it cannot be quantized")

        def one(values: Tensor, weights: Tensor | None, pinned: Tensor | None) -> Tensor:
            has_zero = None if pinned is None else pinned.any(1)
            return kmeans.fit(values, self.levels, weights=weights, zero=has_zero)

        if self.group_size == 0:
            flat = (None if x is None else x.reshape(1, -1) for x in (importance, zero))
            return self.table(one(weight.reshape(1, -1), *flat)[:, None])
        levels = weight.new_empty(rows, groups.count(width, self.group_size), self.levels)
        for columns, some, size in groups.pieces(width, self.group_size):
            parts = (None if x is None else x[:, columns].reshape(-1, size) for x in (importance, zero))
            levels[:, some] = one(weight[:, columns].reshape(-1, size), *parts).view(rows, -1, self.levels)
        return self.table(levels)

    def searched(
        self, weight: Tensor, how: RangeRule, *, importance: Tensor | None = None, support: Tensor | None = None
    ) -> Table:
        """See `Format`."""
        return self.fit(weight, importance=importance, zero=None if support is None else ~support)

    def table(self, levels: Tensor) -> Table:
        """Levels [out, groups, 2^b] in order and as they are stored. Raises LilliputError above the dtype's range."""
        stored = levels.sort(-1).values.to(self.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise LilliputError(
                f"a level exceeds the range of {dtype_name(self.dtype)}: set scale_dtype to float32 (or bfloat16) for "
                "this layer"
            )
        return Table(stored)

    def encode(self, weight: Tensor, grid: Table) -> Tensor:
        """The nearest codes, int8 [out, in]; between two levels at the same distance the smaller."""
        rows, width = weight.shape
        codes = torch.empty(rows, width, dtype=torch.int8, device=weight.device)
        step = max(1, CHUNK // max(width, 1))
        for columns, some, size in groups.pieces(width, self.group_size):
            for a in range(0, rows, step):
                b = min(a + step, rows)
                levels = self.expand(grid, width).rows(a, b).levels[:, some].expand(b - a, -1, -1)
                values = weight[a:b, columns].float().reshape(-1, size)
                index = kmeans.nearest(values, levels.float().reshape(-1, self.levels))
                codes[a:b, columns] = (index - (self.levels >> 1)).to(torch.int8).view(b - a, -1)
        return codes

    def expand(self, grid: Table, width: int) -> Table:
        """The table with its groups written out: [out or 1, groups, 2^b]."""
        return Table(grid.levels.expand(-1, groups.count(width, self.group_size), -1))

    def decode(self, codes: Tensor, grid: Table) -> Tensor:
        """The values of codes [out, in], float32."""
        rows, width = codes.shape
        out = torch.empty(rows, width, dtype=torch.float32, device=codes.device)
        start = groups.index(width, self.group_size, codes.device) * self.levels + (self.levels >> 1)
        table = grid.levels.float().flatten(1)
        step = max(1, CHUNK // max(width, 1))
        for a in range(0, rows, step):
            b = min(a + step, rows)
            index = codes[a:b].long() + start
            out[a:b] = table[0][index] if len(table) == 1 else table[a:b].gather(1, index)
        return out

    def stored(self, rows: int, width: int) -> Stored:
        """See docs/native-format.md, kind "codebook"."""
        units = groups.units(rows, width, self.group_size)
        return {
            "": (torch.uint8, (rows * row_bytes(width, self.bits),)),
            "_table": (self.dtype, (*units, self.levels)),
        }

    def pack(self, codes: Tensor, grid: Table) -> dict[str, Tensor]:
        """The tensors that `stored` describes."""
        return {"": pack_codes(codes, self.bits), "_table": grid.levels.to(self.dtype).contiguous()}

    def unpack(
        self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int
    ) -> tuple[Tensor, Table]:
        """Codes and table of rows [start, stop) of a [rows, width] matrix; `get` returns a stored tensor by suffix."""
        packed = get("").view(rows, -1)[start:stop]
        return unpack_bits(packed, self.bits, width), Table(get("_table")).rows(start, stop)

    def plain(self) -> dict[str, Any]:
        """The entry of config.json."""
        return {
            "kind": "codebook",
            "bits": self.bits,
            "group_size": self.group_size,
            "dtype": dtype_name(self.dtype),
        }


def from_plain(plain: Mapping[str, Any]) -> CodebookFormat:
    """Undo `CodebookFormat.plain`."""
    return CodebookFormat(plain["bits"], plain["group_size"], dtype_of(plain["dtype"]))


def from_target(target: Target) -> CodebookFormat:
    """The codebook that a resolved target asks for; levels in its `scale_dtype` ("auto": float16).

    `symmetric` says nothing here: levels lie where the weights are. Raises PlanError when the target names another
    format, no bits or another kind of scales, or its group size still is "auto".
    """
    if target.format != "codebook":
        raise PlanError(f"levels are learned for format 'codebook', not '{target.format}': set target.format")
    if target.bits is None:
        raise PlanError("a quantizing step needs the number of bits: set target.bits to 2..8")
    return CodebookFormat(target.bits, group_of(target), scale_dtype_of(target))


FAMILY = Family(wanted={"codebook": from_target}, written={"codebook": from_plain})
