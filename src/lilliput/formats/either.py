"""Integers or small floats of equal width, as the weights decide: a byte for each matrix says which.

Integers are symmetric, floats e2m1, e3m2 or e4m3, with the same groups and type of scales, so that both take the same
room. Only a method that chooses makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats import scales
from lilliput.formats.format import Family, Format, RangeRule, Stored, dtype_name, dtype_of
from lilliput.formats.integer import IntegerFormat, IntegerGrid, group_of, scale_dtype_of
from lilliput.formats.levels import LevelFormat
from lilliput.formats.scales import Scales
from lilliput.machine.cost import Cost
from lilliput.target import Target

TABLES: Mapping[int, str] = {4: "e2m1", 6: "e3m2", 8: "e4m3"}


@dataclass(frozen=True)
class EitherGrid:
    """The scales of the format that was chosen."""

    chosen: IntegerGrid | Scales

    @property
    def floats(self) -> bool:
        return isinstance(self.chosen, Scales)

    def rows(self, start: int, stop: int) -> EitherGrid:
        """Those of output rows [start, stop)."""
        return EitherGrid(self.chosen.rows(start, stop))


@dataclass(frozen=True)
class EitherFormat(Format):
    """group_size as in `IntegerFormat`. Raises PlanError for bits that no float has."""

    bits: int
    group_size: int
    scale_dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.bits not in TABLES:
            raise PlanError(f"{self.bits} bits: integers and floats of equal width have 4, 6 or 8; choose one of those")

    @property
    def integers(self) -> IntegerFormat:
        return IntegerFormat(self.bits, True, self.group_size, self.scale_dtype)

    @property
    def floats(self) -> LevelFormat:
        kind = scales.parse(dtype_name(self.scale_dtype))
        return LevelFormat(TABLES[self.bits], self.bits, self.group_size, kind)

    def describe(self) -> str:
        """For tables: "int4 g64 or e2m1"."""
        return f"{self.integers.describe()} or {TABLES[self.bits]}"

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size: codes, scales and the byte."""
        return self.integers.size_bits(rows, width) + 8

    def cost(self, rows: int, width: int) -> Cost:
        """That of the dearer one."""
        return self.integers.cost(rows, width).then(self.floats.cost(rows, width))

    def grids(self, weight: Tensor, how: RangeRule, importance: Tensor | None) -> tuple[EitherGrid, EitherGrid]:
        """The best integers and the best floats for `weight` [out, in]."""
        found = (x.searched(weight, how, importance=importance) for x in (self.integers, self.floats))
        integers, floats = map(EitherGrid, found)
        return integers, floats

    def fit(self, weight: Tensor, *, importance: Tensor | None = None) -> EitherGrid:
        """Of both the one of less squared error, weighed by `importance`."""
        weigh = 1.0 if importance is None else importance
        tried = self.grids(weight, RangeRule("mse"), importance)
        losses = [float(((self.decode(self.encode(weight, x), x) - weight).square() * weigh).sum()) for x in tried]
        return tried[losses[1] < losses[0]]

    def encode(self, weight: Tensor, grid: EitherGrid) -> Tensor:
        """The nearest codes, int8 [out, in]."""
        if isinstance(grid.chosen, Scales):
            return self.floats.encode(weight, grid.chosen)
        return self.integers.encode(weight, grid.chosen)

    def decode(self, codes: Tensor, grid: EitherGrid) -> Tensor:
        """The values of codes [out, in], float32."""
        if isinstance(grid.chosen, Scales):
            return self.floats.decode(codes, grid.chosen)
        return self.integers.decode(codes, grid.chosen)

    def stored(self, rows: int, width: int) -> Stored:
        """See docs/native-format.md, kind "either"."""
        return self.integers.stored(rows, width) | {"_form": (torch.uint8, (1,))}

    def pack(self, codes: Tensor, grid: EitherGrid) -> dict[str, Tensor]:
        """The tensors that `stored` describes."""
        if isinstance(grid.chosen, Scales):
            own = self.floats.pack(codes, grid.chosen)
        else:
            own = self.integers.pack(codes, grid.chosen)
        return own | {"_form": torch.tensor([grid.floats], dtype=torch.uint8, device=codes.device)}

    def unpack(
        self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int
    ) -> tuple[Tensor, EitherGrid]:
        """Codes and scales of rows [start, stop) of a [rows, width] matrix; `get` returns a stored tensor by suffix."""
        inner: IntegerFormat | LevelFormat = self.floats if bool(get("_form")) else self.integers
        codes, own = inner.unpack(get, rows, width, start, stop)
        return codes, EitherGrid(own)

    def plain(self) -> dict[str, Any]:
        """The entry of config.json."""
        entry: dict[str, Any] = {"kind": "either", "bits": self.bits, "group_size": self.group_size}
        return entry | {"scale_dtype": dtype_name(self.scale_dtype)}


def from_target(target: Target) -> EitherFormat:
    """The formats that a resolved target lets choose between. Raises PlanError where there are none."""
    if not target.symmetric:
        raise PlanError("floats have no zero points: leave out symmetric: false")
    return EitherFormat(target.bits or 4, group_of(target), scale_dtype_of(target))


def from_plain(plain: Mapping[str, Any]) -> EitherFormat:
    """Undo `EitherFormat.plain`."""
    return EitherFormat(plain["bits"], plain["group_size"], dtype_of(plain["scale_dtype"]))


FAMILY = Family(wanted={}, written={"either": from_plain})
