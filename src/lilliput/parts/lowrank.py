"""A product of two thin factors, each of them a part: plain or quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lilliput.algebra import lowrank
from lilliput.errors import LilliputError
from lilliput.formats.format import DTYPES, Stored
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.dense import DensePart, DenseSpec
from lilliput.parts.layer import Layer
from lilliput.parts.part import Get, Part, PartSpec, below
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec

Factors = Literal["float16", "bfloat16", "float32", "int8", "int6", "int5", "int4", "int3", "int2"]


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

    def factors(self, get: Get, rows: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """left [rows, rank] and right [rank, width] with dtype and device of `like`."""
        left = torch.zeros(rows, self.rank, dtype=like.dtype, device=like.device)
        right = torch.zeros(self.rank, width, dtype=like.dtype, device=like.device)
        self.left.add_to(left, get)
        self.right.add_to(right, below(get, "_right"))
        return left, right

    def operations(self, rows: int, width: int) -> int:
        factors = self.left.operations(rows, self.rank) + self.right.operations(self.rank, width)
        return factors + 2 * self.rank * rows * width

    def add_to(self, out: Tensor, get: Get) -> None:
        left, right = self.factors(get, out.shape[0], out.shape[1], torch.empty(0, device=out.device))
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


def factor_spec(name: Factors) -> PartSpec:
    """How a factor is stored: a float type, or symmetric integers with one half-precision scale for each row."""
    if name in DTYPES:
        return DenseSpec(DTYPES[name])
    return QuantizedSpec(IntegerFormat(int(name.removeprefix("int")), True, -1, torch.float16))


def as_part(values: Tensor, spec: PartSpec) -> Part:
    """A factor [rows, columns] as `spec`, of `factor_spec`, stores it; integers on the range of least squared error.

    Raises LilliputError for values that the type cannot hold.
    """
    values = values.float()
    if isinstance(spec, QuantizedSpec) and isinstance(spec.format, IntegerFormat):
        grid = spec.format.fit(values, search="mse")
        return QuantizedPart(spec.format, spec.format.encode(values, grid), grid)
    if not isinstance(spec, DenseSpec):
        raise TypeError(f"a factor is stored as floats or integers, not as {spec.describe()}")
    part = DensePart(values.to(spec.dtype), spec.dtype)
    if not bool(torch.isfinite(part.weight).all()):
        raise LilliputError(f"a factor exceeds the range of {spec.describe()}: set factors to bfloat16 or float32")
    return part


def rest_of(layer: Layer) -> Tensor:
    """What the parts of a layer leave over, [out, in]. Raises LilliputError where it is pruned: a product of factors,
    which has no zeros, would fill it again."""
    if layer.support is not None:
        raise LilliputError(
            f"{layer.name} is pruned, and a matrix of low rank has no zeros: leave one of the steps out"
        )
    return layer.rest()


def approximate(
    weight: Tensor,
    rank: int,
    spec: PartSpec,
    metric: Tensor | None = None,
    rows: Tensor | None = None,
    split: Literal["even", "right"] = "even",
    root: Tensor | None = None,
) -> LowRankPart:
    """The product of rank `rank` nearest to `weight` [out, in], both factors stored as `spec` says.

    `metric`, `rows` and `root` as in `algebra.lowrank`. Both factors carry the roots of the singular values, or the
    right one carries them whole. The left factor is rounded first; the right one is fitted to what it has become.
    Raises LilliputError for a weight or metric that is not finite, and for factors that the type cannot hold.
    """
    spectrum = lowrank.spectrum(weight, metric, rows, root)
    basis = spectrum.basis[:, :rank]
    if rows is not None:
        basis = basis / rows.double()[:, None]
    if split == "even":
        basis = basis * _roots(spectrum.energy[:rank])
    left = as_part(basis, spec)
    return LowRankPart(left, as_part(lowrank.project(left.decode(), weight, rows), spec))


def _roots(energy: Tensor) -> Tensor:
    """Roots of the singular values [k] from their squares; none is so small that half precision would lose it."""
    largest = energy.max().clamp_min(1e-30)
    return (energy / largest).clamp_min(1e-8).pow(0.25) * largest.pow(0.25).clamp(1e-3, 1e3)
