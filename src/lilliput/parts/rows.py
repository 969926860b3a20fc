"""A part of some output rows only; the others are 0."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lilliput.formats.format import Stored
from lilliput.parts.part import Get, Part, PartSpec


@dataclass(frozen=True)
class RowsSpec:
    """`count` rows, held as `inner` [count, in] with their numbers in 32 bits."""

    count: int
    inner: PartSpec

    def describe(self) -> str:
        return f"{self.inner.describe()} in {self.count} rows"

    def size_bits(self, rows: int, width: int) -> int:
        return self.inner.size_bits(self.count, width) + 32 * self.count

    def stored(self, rows: int, width: int) -> Stored:
        return self.inner.stored(self.count, width) | {"_rows": (torch.int32, (self.count,))}

    def operations(self, rows: int, width: int) -> int:
        return self.inner.operations(self.count, width)

    def add_to(self, out: Tensor, get: Get) -> None:
        some = torch.zeros(self.count, out.shape[1], device=out.device)
        self.inner.add_to(some, get)
        out.index_add_(0, get("_rows").long(), some.to(out.dtype))

    def plain(self) -> dict[str, Any]:
        return {"kind": "rows", "count": self.count, "part": self.inner.plain()}


@dataclass(frozen=True)
class RowsPart:
    """`inner` [count, in] in the rows `index`, int64 [count], rising, of `total`."""

    inner: Part
    index: Tensor
    total: int

    @property
    def spec(self) -> RowsSpec:
        return RowsSpec(len(self.index), self.inner.spec)

    def decode(self) -> Tensor:
        some = self.inner.decode()
        return torch.zeros(self.total, some.shape[1], device=some.device).index_copy_(0, self.index, some)

    def bits(self) -> int:
        return self.inner.bits() + 32 * len(self.index)

    def pack(self) -> dict[str, Tensor]:
        return self.inner.pack() | {"_rows": self.index.to(torch.int32)}

    def rows(self, start: int, stop: int) -> RowsPart:
        a, b = (int(n) for n in torch.searchsorted(self.index, torch.tensor([start, stop], device=self.index.device)))
        return replace(self, inner=self.inner.rows(a, b), index=self.index[a:b] - start, total=stop - start)
