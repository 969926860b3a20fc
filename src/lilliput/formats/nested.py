"""Integers whose scales, and perhaps zero points, are themselves stored in few bits (`formats.scales`).

Codes are those of `formats.integer`: value = (code - zero) * scale in float32. Zero points are whole, so that 0 is
always among the values. With scales of kind intB/N they take the same kind as the scales: low + code * step, rounded;
else each has `bits` bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lilliput.algebra import ranges
from lilliput.algebra.obs import Rounding
from lilliput.errors import PlanError
from lilliput.formats import groups, integer, scales
from lilliput.formats.bits import pack_bits, row_bytes, unpack_bits
from lilliput.formats.format import Family, Format, RangeRule, Stored
from lilliput.formats.integer import IntegerFormat, IntegerGrid, group_of, pack_codes, uncentred, unpack_codes
from lilliput.formats.level_search import Weighed
from lilliput.formats.levels import check_group, describe_scales
from lilliput.formats.scales import FloatScales, ScaleKind, Scales
from lilliput.formats.shared_scales import AffineScales
from lilliput.target import Target


@dataclass(frozen=True)
class NestedGrid:
    """Scales, and zero points: none, int8 [out, groups], or of the scales' kind."""

    scales: Scales
    zeros: Tensor | Scales | None = None

    def rows(self, start: int, stop: int) -> NestedGrid:
        """The grid of output rows [start, stop). Raises ValueError where blocks of scales reach over rows."""
        zeros = self.zeros
        if isinstance(zeros, Scales):
            zeros = zeros.rows(start, stop)
        elif zeros is not None and zeros.shape != (1, 1):
            zeros = zeros[start:stop]
        return NestedGrid(self.scales.rows(start, stop), zeros)


@dataclass(frozen=True)
class NestedFormat(Format):
    """Integers of `bits` bits in groups, with scales of a kind that is no plain float.

    Raises PlanError for bits outside 2..8 and groups that the kind of scales cannot serve.
    """

    bits: int
    symmetric: bool
    group_size: int
    scales: ScaleKind

    def __post_init__(self) -> None:
        _ = self.codes  # checks bits and group size
        check_group(self.group_size, self.scales)

    @property
    def codes(self) -> IntegerFormat:
        """The same integers with plain scales of 32 bits."""
        return IntegerFormat(self.bits, self.symmetric, self.group_size, torch.float32)

    def describe(self) -> str:
        """For tables: "int4 g64 asym int8/256 scales"."""
        return self.codes.describe() + describe_scales(self.scales)

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size: codes, scales and zero points with all that they share."""
        units = groups.units(rows, width, self.group_size)
        total = rows * width * self.bits + self.scales.size_bits(*units)
        if self.symmetric:
            return total
        zeros = self._zero_kind
        return total + (units[0] * units[1] * self.bits if zeros is None else zeros.size_bits(*units))

    def fit(
        self,
        weight: Tensor,
        *,
        search: Literal["minmax", "mse"] = "minmax",
        importance: Tensor | None = None,
        steps: int = 30,
        norm: float = 2.0,
    ) -> NestedGrid:
        """The grid for `weight` [out, in].

        The scales of plain integers ("minmax" or "mse" as `IntegerFormat.fit` says), stored in their kind; "mse" then
        looks among the neighbours of their codes. Zero points are those of the scales as stored.

        Raises LilliputError for NaN or infinity in the weight or importance, and for a scale above its kind.
        """
        weight = weight.float()
        plain = self.codes.fit(weight, search=search, importance=importance, steps=steps, norm=norm)
        weighed = Weighed(weight, self.group_size, ranges.relative(weight, importance), norm)
        low, peak = self._range(weighed)
        kind, top = self.scales, float((1 << self.bits) - 1 if not self.symmetric else self.codes.highest)
        lows = [low]
        if search == "mse" and plain.zero is not None:
            lows.append((self.codes.lowest - plain.zero.float()) * plain.scale)

        def error(scale: Tensor, zero: Tensor | None) -> Tensor:
            return self._error(weighed, scale, zero)

        def zero(scale: Tensor) -> tuple[Tensor | None, Tensor]:
            """The better zero point of those that put a code on the lowest value, and what it loses."""
            if self.symmetric:
                return None, error(scale, None)
            best = self._whole(self.codes.lowest - lows[0] / scale)
            least = error(scale, best)
            for other in lows[1:]:
                trial = self._whole(self.codes.lowest - other / scale)
                loss = error(scale, trial)
                best = torch.where(loss < least, trial, best)
                least = torch.minimum(loss, least)
            return best, least

        if search == "mse":
            ideal = torch.where(peak > 0, plain.scale, 0.0) * top
            fitted = scales.choose(kind, peak, ideal, top, lambda s: zero(s)[1])
        else:
            fitted = Scales(kind, kind.coded(peak, top, second := kind.second(peak, top)), second)
        ranges.check(weight, fitted.values(), kind.name)
        ideal_zero, _ = zero(fitted.values())
        if ideal_zero is None:
            return NestedGrid(fitted)
        zeros = self._zero_kind
        if zeros is None:
            return NestedGrid(fitted, ideal_zero.to(torch.int8))
        zero_scales = Scales(zeros, zeros.coded(ideal_zero, 1.0, shared := zeros.second(ideal_zero, 1.0)), shared)
        if search == "mse":
            zero_scales = scales.search(zero_scales, lambda z: error(fitted.values(), self._whole(z)))
            fitted = scales.search(fitted, lambda s: error(s, self._whole(zero_scales.values())))
        return NestedGrid(fitted, zero_scales)

    def searched(
        self, weight: Tensor, how: RangeRule, *, importance: Tensor | None = None, support: Tensor | None = None
    ) -> NestedGrid:
        """See `Format`."""
        return self.fit(weight, search=how.search, importance=importance, steps=how.steps, norm=how.norm)

    def magnitudes(self) -> Tensor:
        """See `ranged.Ranged`."""
        return self.codes.magnitudes()

    def sweep_grid(self, grid: NestedGrid) -> tuple[IntegerGrid, torch.dtype | None]:
        """See `swept.Sweepable`."""
        return self.grid(grid), None

    def swept_grid(self, swept: IntegerGrid, grid: NestedGrid) -> NestedGrid:
        """See `swept.Sweepable`."""
        return grid

    def sweep_rounding(self, swept: IntegerGrid, rows: int, group: Sequence[int]) -> Rounding:
        """See `swept.Sweepable`."""
        return Rounding.of(swept.scale, swept.zero, self.bits, rows, group)

    def swept_codes(self, centred: Tensor, swept: IntegerGrid, group: Sequence[int]) -> Tensor:
        """See `swept.Sweepable`."""
        return uncentred(centred, swept.zero, group)

    def grid(self, grid: NestedGrid) -> IntegerGrid:
        """The plain grid that a nested one stands for: scales float32, zero points int8."""
        zeros = grid.zeros
        if isinstance(zeros, Scales):
            zeros = self._whole(zeros.values()).to(torch.int8)
        return IntegerGrid(grid.scales.values(), zeros)

    def encode(self, weight: Tensor, grid: NestedGrid) -> Tensor:
        """The nearest codes, int8 [out, in]."""
        return self.codes.encode(weight, self.grid(grid))

    def decode(self, codes: Tensor, grid: NestedGrid) -> Tensor:
        """The values of codes [out, in], float32."""
        return self.codes.decode(codes, self.grid(grid))

    def stored(self, rows: int, width: int) -> Stored:
        """See docs/native-format.md, kind "nested"."""
        units = groups.units(rows, width, self.group_size)
        tensors: Stored = {"": (torch.uint8, (rows * row_bytes(width, self.bits),))}
        tensors |= {f"_scale{suffix}": x for suffix, x in self.scales.stored(*units).items()}
        if self.symmetric:
            return tensors
        zeros = self._zero_kind
        if zeros is None:
            return {**tensors, "_zero": (torch.uint8, (row_bytes(units[0] * units[1], self.bits),))}
        return tensors | {f"_zero{suffix}": x for suffix, x in zeros.stored(*units).items()}

    def pack(self, codes: Tensor, grid: NestedGrid) -> dict[str, Tensor]:
        """The tensors that `stored` describes."""
        tensors = {"": pack_codes(codes, self.bits)}
        own, zeros = grid.scales, grid.zeros
        tensors |= {f"_scale{suffix}": x for suffix, x in own.kind.pack(own.codes, own.second).items()}
        if isinstance(zeros, Scales):
            tensors |= {f"_zero{suffix}": x for suffix, x in zeros.kind.pack(zeros.codes, zeros.second).items()}
        elif zeros is not None:
            tensors["_zero"] = pack_bits(zeros.reshape(1, -1), self.bits).view(-1)
        return tensors

    def unpack(
        self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int
    ) -> tuple[Tensor, NestedGrid]:
        """Codes and grid of rows [start, stop) of a [rows, width] matrix; `get` returns a stored tensor by suffix."""
        units = groups.units(rows, width, self.group_size)
        codes = unpack_codes(get, self.bits, rows, width, start, stop)
        own = scales.unpack(self.scales, get, units, start, stop)
        if self.symmetric:
            return codes, NestedGrid(own)
        if self._zero_kind is not None:
            return codes, NestedGrid(own, scales.unpack(self._zero_kind, get, units, start, stop, "_zero"))
        zero = unpack_bits(get("_zero").view(1, -1), self.bits, units[0] * units[1]).view(units)
        return codes, NestedGrid(own, zero if units == (1, 1) else zero[start:stop])

    def plain(self) -> dict[str, Any]:
        """The entry of config.json."""
        entry: dict[str, Any] = {"kind": "nested", "bits": self.bits, "symmetric": self.symmetric}
        return {**entry, "group_size": self.group_size, "scales": self.scales.name}

    @property
    def _zero_kind(self) -> AffineScales | None:
        kind = self.scales
        return AffineScales(kind.bits, kind.block, positive=False) if isinstance(kind, AffineScales) else None

    def _whole(self, zero: Tensor) -> Tensor:
        return zero.round().clamp_(self.codes.lowest, self.codes.highest)

    def _range(self, weighed: Weighed) -> tuple[Tensor, Tensor]:
        """Lowest value, at most 0, and largest magnitude or, asymmetric, extent of each group."""
        low = weighed.weight.new_empty(weighed.units)
        peak = torch.empty_like(low)
        for rows, some, w, _ in weighed.blocks():
            least, most = w.amin(-1).clamp_(max=0.0), w.amax(-1).clamp_(min=0.0)
            low[rows, some] = least
            peak[rows, some] = torch.maximum(most, -least) if self.symmetric else most - least
        return low, peak

    def _error(self, weighed: Weighed, scale: Tensor, zero: Tensor | None) -> Tensor:
        loss = torch.empty_like(scale)
        for rows, some, w, importance in weighed.blocks():
            step = scale[rows, some].unsqueeze(-1)
            at = torch.zeros_like(step) if zero is None else zero[rows, some].unsqueeze(-1)
            code = (w * step.reciprocal()).round_()
            code = torch.minimum(torch.maximum(code, self.codes.lowest - at), self.codes.highest - at)
            loss[rows, some] = weighed.cost(code.mul_(step).sub_(w), importance)
        return loss


def from_target(target: Target) -> IntegerFormat | NestedFormat:
    """The integers that a resolved target asks for, with any kind of scales ("auto": float16).

    Raises PlanError when the target names another format, no bits or no kind of scales, or its group size is "auto".
    """
    kind = scales.parse(target.scale_dtype)
    if isinstance(kind, FloatScales):
        return integer.from_target(target)
    if target.bits is None:
        raise PlanError("a quantizing step needs the number of bits: set target.bits to 2..8")
    return NestedFormat(target.bits, target.symmetric, group_of(target), kind)


def from_plain(plain: Mapping[str, Any]) -> NestedFormat:
    """Undo `NestedFormat.plain`."""
    return NestedFormat(plain["bits"], plain["symmetric"], plain["group_size"], scales.from_plain(plain["scales"]))


FAMILY = Family(wanted={"int": from_target}, written={"nested": from_plain}, zero_points=True, swept=True)
