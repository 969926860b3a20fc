"""n weights of every m neighbours: their values as a part of their own, and their places in log2(m) bits each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lilliput.algebra.masks import largest
from lilliput.errors import PlanError
from lilliput.formats.bits import pack_bits, row_bytes, unpack_bits
from lilliput.formats.format import Stored
from lilliput.parts.dense import DensePart, DenseSpec
from lilliput.parts.part import Get, Part, PartSpec

LARGEST = 256  # neighbours that a pattern may span: places are bytes at most


@dataclass(frozen=True)
class PatternSpec:
    """`n` of every `m` consecutive inputs, their values [rows, width / m * n] held as `values`.

    Raises PlanError unless 1 <= n <= m <= 256, and `stored` does for a width that m does not divide.
    """

    n: int
    m: int
    values: PartSpec = DenseSpec(torch.float16)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m <= LARGEST:
            raise PlanError(f"a pattern of {self.n}:{self.m}: give n:m with 1 <= n <= m <= {LARGEST}, such as 2:4")

    @property
    def place_bits(self) -> int:
        """Bits of a place within m inputs."""
        return max(1, (self.m - 1).bit_length())

    def stored_per_row(self, width: int) -> int:
        """Stored weights of a row. Raises PlanError where m does not divide the width."""
        if width % self.m:
            raise PlanError(f"the pattern {self.n}:{self.m} does not divide a width of {width}: leave this layer out")
        return width // self.m * self.n

    def describe(self) -> str:
        return f"{self.n}:{self.m} {self.values.describe()}"

    def size_bits(self, rows: int, width: int) -> int:
        count = self.stored_per_row(width)
        return self.values.size_bits(rows, count) + rows * count * self.place_bits

    def stored(self, rows: int, width: int) -> Stored:
        count = self.stored_per_row(width)
        places: Stored = {"_place": (torch.uint8, (rows * row_bytes(count, self.place_bits),))}
        return self.values.stored(rows, count) | places

    def operations(self, rows: int, width: int) -> int:
        return self.values.operations(rows, self.stored_per_row(width))

    def add_to(self, out: Tensor, get: Get) -> None:
        rows, width = out.shape
        count = self.stored_per_row(width)
        values = torch.zeros(rows, count, device=out.device)
        self.values.add_to(values, get)
        codes = unpack_bits(get("_place").view(rows, -1), self.place_bits, count)
        out.scatter_add_(1, self.columns(codes.long() + (1 << (self.place_bits - 1))), values.to(out.dtype))

    def columns(self, places: Tensor) -> Tensor:
        """Places within m [rows, kept] to columns, int64."""
        return places + torch.arange(places.shape[1], device=places.device) // self.n * self.m

    def plain(self) -> dict[str, Any]:
        return {"kind": "pattern", "n": self.n, "m": self.m, "values": self.values.plain()}


@dataclass(frozen=True)
class PatternPart:
    """`values` a part [out, kept] and `places` int64 [out, kept] of 0 .. m - 1, rising within every m inputs."""

    n: int
    m: int
    values: Part
    places: Tensor

    @property
    def spec(self) -> PatternSpec:
        return PatternSpec(self.n, self.m, self.values.spec)

    def decode(self) -> Tensor:
        rows, count = self.places.shape
        out = torch.zeros(rows, count // self.n * self.m, device=self.places.device)
        return out.scatter_(1, self.spec.columns(self.places), self.values.decode())

    def bits(self) -> int:
        return self.values.bits() + self.places.numel() * self.spec.place_bits

    def pack(self) -> dict[str, Tensor]:
        bits = self.spec.place_bits
        return self.values.pack() | {"_place": pack_bits(self.places - (1 << (bits - 1)), bits).view(-1)}

    def rows(self, start: int, stop: int) -> PatternPart:
        return replace(self, values=self.values.rows(start, stop), places=self.places[start:stop])


def places_of(score: Tensor, n: int, m: int) -> Tensor:
    """Where the `n` highest of every `m` scores [out, in] are, int64 [out, in / m * n] of 0 .. m - 1; among equals the
    first."""
    rows, width = score.shape
    count = PatternSpec(n, m).stored_per_row(width)
    mask = largest(score.reshape(-1, m), n)
    return mask.nonzero()[:, 1].view(rows, count)


def values_at(weight: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    """The weights [out, in] at `places`, [out, kept]: what a part for the values is made from."""
    return weight.gather(1, PatternSpec(n, m).columns(places))


def gather(weight: Tensor, score: Tensor, n: int, m: int, dtype: torch.dtype = torch.float16) -> PatternPart:
    """The weights [out, in] of the `n` highest scores among every `m`, as plain values of `dtype`."""
    places = places_of(score, n, m)
    return PatternPart(n, m, DensePart(values_at(weight, places, n, m), dtype), places)


def from_plain(plain: Mapping[str, Any], values: PartSpec) -> PatternSpec:
    """Undo `PatternSpec.plain`, given the part of the values."""
    return PatternSpec(int(plain["n"]), int(plain["m"]), values)
