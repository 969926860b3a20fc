"""A product of two thin factors, each of them a part: plain or quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lilliput.formats.format import Stored
from lilliput.parts.dense import DensePart, DenseSpec
from lilliput.parts.part import Get, Part, PartSpec, below


@dataclass(frozen=True)
class LowRankSpec:
    """left [out, rank] times right [rank, in]."""

    rank: int
    left: PartSpec = DenseSpec(torch.float16)  # noqa: RUF009 - frozen
    right: PartSpec = DenseSpec(torch.float16)  # noqa: RUF009 - frozen

    def describe(self) -> str:
        kinds = dict.fromkeys((self.left.describe(), self.right.describe()))
        return f"rank {self.rank} ({', '.join(kinds)})"

    def size_bits(self, rows: int, width: int) -> int:
        return self.left.size_bits(rows, self.rank) + self.right.size_bits(self.rank, width)

    def stored(self, rows: int, width: int) -> Stored:
        left = self.left.stored(rows, self.rank)
        return left | {f"_right{suffix}": x for suffix, x in self.right.stored(self.rank, width).items()}

    def add_to(self, out: Tensor, get: Get) -> None:
        rows, width = out.shape
        left = torch.zeros(rows, self.rank, device=out.device)
        right = torch.zeros(self.rank, width, device=out.device)
        self.left.add_to(left, get)
        self.right.add_to(right, below(get, "_right"))
        out += left @ right

    def plain(self) -> dict[str, Any]:
        return {"kind": "low-rank", "rank": self.rank, "left": self.left.plain(), "right": self.right.plain()}


@dataclass(frozen=True)
class LowRankPart:
    """left [out, rank] times right [rank, in]."""

    left: Part
    right: Part

    @property
    def spec(self) -> LowRankSpec:
        return LowRankSpec(len(self.right.decode()), self.left.spec, self.right.spec)

    def decode(self) -> Tensor:
        return self.left.decode() @ self.right.decode()

    def bits(self) -> int:
        return self.left.bits() + self.right.bits()

    def pack(self) -> dict[str, Tensor]:
        return self.left.pack() | {f"_right{suffix}": x for suffix, x in self.right.pack().items()}

    def rows(self, start: int, stop: int) -> LowRankPart:
        return replace(self, left=self.left.rows(start, stop))


def plain_factors(left: Tensor, right: Tensor, dtype: torch.dtype = torch.float16) -> LowRankPart:
    """Factors [out, rank] and [rank, in] stored in `dtype`."""
    return LowRankPart(DensePart(left, dtype), DensePart(right, dtype))
