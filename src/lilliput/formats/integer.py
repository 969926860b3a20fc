"""Integer grids of 2..8 bits: one scale (and zero point) per tensor, per output row, or per group of inputs.

Codes are signed, -2^(b-1) .. 2^(b-1)-1, and `value = (code - zero) * scale`, computed in float32 from the scale as it
is stored. Scales are rounded to their stored type before anything is quantized, so a written file holds exactly what
was measured. When the group size does not divide the width, the last group of each row is shorter; nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lilliput.algebra import ranges
from lilliput.algebra.obs import Rounding
from lilliput.errors import PlanError
from lilliput.formats import groups
from lilliput.formats.bits import pack_bits, row_bytes, unpack_bits
from lilliput.formats.format import CHUNK, DTYPES, Family, Format, RangeRule, Stored, dtype_name, dtype_of
from lilliput.target import Target

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CHUNK = 1 << 18  # weights worked on at a time: two float32 buffers of this size stay in the cores' second-level caches


@dataclass(frozen=True)
class IntegerGrid:
    """Where the codes of a matrix lie: scale [out, groups] in the format's scale dtype ([1, 1] for one per tensor), and
    zero int8 of the same shape, in code units (None: symmetric)."""

    scale: Tensor
    zero: Tensor | None = None

    def rows(self, start: int, stop: int) -> IntegerGrid:
        """The grid of output rows [start, stop); a grid per tensor serves all rows."""
        if self.scale.shape == (1, 1):
            return self
        return IntegerGrid(self.scale[start:stop], None if self.zero is None else self.zero[start:stop])


@dataclass(frozen=True)
class IntegerFormat(Format):
    """Integers of `bits` bits. `group_size`: -1 one scale per output row, 0 one per tensor, else inputs per group.

    Raises PlanError for bits outside 2..8, a group size below -1 or a scale dtype that is not a float of 16 or 32 bits.
    """

    signed_scales: ClassVar[bool] = True

    bits: int
    symmetric: bool
    group_size: int
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise PlanError(f"{self.bits} bits: integer grids have 2 to 8 bits; choose one of those")
        if self.group_size < -1:
            raise PlanError(f"group size {self.group_size}: give a positive number, 0 (per tensor) or -1 (per row)")
        if self.scale_dtype not in SCALE_DTYPES:
            raise PlanError(f"scales in {self.scale_dtype}: choose float16, bfloat16 or float32")

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def describe(self) -> str:
        """For tables: "int4 g64 asym"."""
        unit = {-1: "row", 0: "tensor"}.get(self.group_size, f"g{self.group_size}")
        return f"int{self.bits} {unit} {'sym' if self.symmetric else 'asym'}"

    def groups(self, width: int) -> int:
        """Groups in a row of `width` inputs; the last is shorter when the group size does not divide the width."""
        return groups.count(width, self.group_size)

    def group_of(self, width: int, device: torch.device | str = "cpu") -> Tensor:
        """The group of each input, int64 [width]."""
        return groups.index(width, self.group_size, device)

    def levels(self, device: torch.device | str) -> None:
        """See `rounding.Trainable`."""

    def opened(self, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
        """See `rounding.Trainable`."""
        scale = grid.scale.float()
        return scale, torch.zeros_like(scale) if grid.zero is None else grid.zero.float()

    def nearest(self, scale: Tensor, zero: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
        """See `rounding.Trainable`."""
        return ranges.stored(scale, self.scale_dtype), zero.round().clamp_(self.lowest, self.highest)

    def closed(self, scale: Tensor, zero: Tensor, grid: IntegerGrid) -> IntegerGrid:
        """See `rounding.Trainable`."""
        return IntegerGrid(scale.to(self.scale_dtype), None if self.symmetric else zero.to(torch.int8))

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size: codes, scales, and zero points at `bits` bits each."""
        units = math.prod(groups.units(rows, width, self.group_size))
        return rows * width * self.bits + units * (self.scale_dtype.itemsize * 8 + (0 if self.symmetric else self.bits))

    def fit(
        self,
        weight: Tensor,
        *,
        search: Literal["minmax", "mse"] = "minmax",
        importance: Tensor | None = None,
        steps: int = 30,
        norm: float = 2.0,
        signed_scale: bool = False,
        polish: bool = True,
    ) -> IntegerGrid:
        """The grid for `weight` [out, in].

        "minmax" covers the range: scale max|w| / (2^(b-1) - 1), or (hi - lo) / (2^b - 1) with lo <= 0 <= hi. "mse"
        shrinks that range on a scale of `steps` factors, every third and then the best one's neighbours, and keeps,
        for each unit, the least sum of importance * |error|^norm, then with `polish` tries neighbouring zero points and
        the least-squares scale of the codes; it is never worse than minmax under that measure. `importance` [in] or
        [out, in] is not negative; None counts all alike. `signed_scale` lets a symmetric scale be negative, which puts
        the one extra code on the side where the longer tail is.
        A unit of zeros, or of nothing, gets scale 1. Scales below the smallest positive value of the scale dtype are
        raised to it.

        Raises LilliputError for NaN or infinity in the weight or importance, and for a scale above the scale dtype.
        """
        rows, width = weight.shape
        weight = weight.float()
        importance = ranges.relative(weight, importance)
        if not weight.numel():
            empty = torch.ones(groups.units(rows, width, self.group_size), device=weight.device)
            return IntegerGrid(
                empty.to(self.scale_dtype), None if self.symmetric else torch.zeros_like(empty, dtype=torch.int8)
            )
        rule = ranges.Rule(self.bits, self.symmetric, self.scale_dtype, search, steps, norm, signed_scale, polish)
        if self.group_size == 0:
            one = None if importance is None else importance.expand(rows, width).reshape(1, 1, -1)
            scale, zero = ranges.fit(weight.reshape(1, 1, -1), one, rule)
        else:
            shape = (rows, self.groups(width))
            scale, zero = weight.new_empty(shape), weight.new_empty(shape)
            step = max(1, _CHUNK // max(width, 1))
            for columns, units, size in groups.pieces(width, self.group_size):
                for a in range(0, rows, step):
                    b = min(a + step, rows)
                    part = groups.split(weight[a:b, columns], size)
                    weights = None
                    if importance is not None:
                        some = importance if importance.shape[0] == 1 else importance[a:b]
                        weights = groups.split(some[:, columns], size)
                    scale[a:b, units], zero[a:b, units] = ranges.fit(part, weights, rule)
        ranges.check(weight, scale, dtype_name(self.scale_dtype))
        return IntegerGrid(scale.to(self.scale_dtype), None if self.symmetric else zero.to(torch.int8))

    def searched(
        self, weight: Tensor, how: RangeRule, *, importance: Tensor | None = None, support: Tensor | None = None
    ) -> IntegerGrid:
        """See `Format`."""
        return self.fit(
            weight,
            search=how.search,
            importance=importance,
            steps=how.steps,
            norm=how.norm,
            signed_scale=how.signed_scale,
        )

    def magnitudes(self) -> Tensor:
        """See `ranged.Ranged`."""
        return torch.arange(float(1 << (self.bits - 1)))

    def sweep_grid(self, grid: IntegerGrid) -> tuple[IntegerGrid, torch.dtype | None]:
        """See `swept.Sweepable`."""
        zero = None if grid.zero is None else grid.zero.clone()
        return IntegerGrid(grid.scale.clone(), zero), self.scale_dtype if self.group_size != 0 else None

    def swept_grid(self, swept: IntegerGrid, grid: IntegerGrid) -> IntegerGrid:
        """See `swept.Sweepable`."""
        return swept

    def sweep_rounding(self, swept: IntegerGrid, rows: int, group: Sequence[int]) -> Rounding:
        """See `swept.Sweepable`."""
        return Rounding.of(swept.scale, swept.zero, self.bits, rows, group)

    def swept_codes(self, centred: Tensor, swept: IntegerGrid, group: Sequence[int]) -> Tensor:
        """See `swept.Sweepable`."""
        return uncentred(centred, swept.zero, group)

    def encode(self, weight: Tensor, grid: IntegerGrid) -> Tensor:
        """The nearest codes, int8 [out, in]: round(w / scale) + zero, clipped. Ties go to the even multiple."""
        rows, width = weight.shape
        codes = torch.empty(rows, width, dtype=torch.int8, device=weight.device)
        for columns, scale, zero, size in self._units(grid, width):
            value = groups.split(weight[:, columns].float(), size).mul(scale.reciprocal()).round_().add_(zero)
            codes[:, columns] = value.clamp_(self.lowest, self.highest).flatten(1).to(torch.int8)
        return codes

    def decode(self, codes: Tensor, grid: IntegerGrid) -> Tensor:
        """The values of codes [out, in], float32."""
        rows, width = codes.shape
        out = torch.empty(rows, width, dtype=torch.float32, device=codes.device)
        for columns, scale, zero, size in self._units(grid, width):
            torch.mul(groups.split(codes[:, columns], size) - zero, scale, out=groups.split(out[:, columns], size))
        return out

    def stored(self, rows: int, width: int) -> Stored:
        """See docs/native-format.md, kind "int"."""
        grid = groups.units(rows, width, self.group_size)
        tensors: Stored = {
            "": (torch.uint8, (rows * row_bytes(width, self.bits),)),
            "_scale": (self.scale_dtype, grid),
        }
        if not self.symmetric:
            tensors["_zero"] = (torch.uint8, (row_bytes(grid[0] * grid[1], self.bits),))
        return tensors

    def pack(self, codes: Tensor, grid: IntegerGrid) -> dict[str, Tensor]:
        """The tensors that `stored` describes."""
        tensors = {"": pack_codes(codes, self.bits), "_scale": grid.scale.to(self.scale_dtype).contiguous()}
        if grid.zero is not None:
            tensors["_zero"] = pack_bits(grid.zero.reshape(1, -1), self.bits).view(-1)
        return tensors

    def unpack(
        self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int
    ) -> tuple[Tensor, IntegerGrid]:
        """Codes and grid of rows [start, stop) of a [rows, width] matrix; `get` returns a stored tensor by suffix."""
        return unpack_codes(get, self.bits, rows, width, start, stop), self.unpack_grid(get).rows(start, stop)

    def unpack_grid(self, get: Callable[[str], Tensor]) -> IntegerGrid:
        """The grid of all rows, without the codes."""
        scale = get("_scale")
        zero = None
        if not self.symmetric:
            zero = unpack_bits(get("_zero").view(1, -1), self.bits, scale.numel()).view(scale.shape)
        return IntegerGrid(scale, zero)

    def plain(self) -> dict[str, Any]:
        """The entry of config.json."""
        return {
            "kind": "int",
            "bits": self.bits,
            "symmetric": self.symmetric,
            "group_size": self.group_size,
            "scale_dtype": dtype_name(self.scale_dtype),
        }

    def expand(self, grid: IntegerGrid, width: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of every weight, float32 [out, in] (a grid per tensor or row is a view; [1, in] per
        tensor)."""
        scale = grid.scale.float()
        zero = torch.zeros(1, 1, device=scale.device) if grid.zero is None else grid.zero.float()
        if scale.shape[1] == 1:
            return scale.expand(-1, width), zero.expand(scale.shape[0], width)
        index = self.group_of(width, scale.device)
        return scale[:, index], zero.expand_as(scale)[:, index]

    def _units(self, grid: IntegerGrid, width: int) -> Iterator[tuple[slice, Tensor, Tensor, int]]:
        for columns, units, size in groups.pieces(width, self.group_size):
            scale = grid.scale[:, units].float().unsqueeze(-1)
            zero = torch.zeros_like(scale) if grid.zero is None else grid.zero[:, units].float().unsqueeze(-1)
            yield columns, scale, zero, size


def uncentred(centred: Tensor, zero: Tensor | None, group: Sequence[int]) -> Tensor:
    """Codes less their zero points [in, out], overwritten, to codes int8 [out, in]; `zero` [out, groups], int8 or real,
    and `group`: of each column."""
    if zero is not None:
        columns = torch.tensor(group, device=centred.device)
        centred += zero.float().expand(centred.shape[1], -1).T[columns]
        if zero.is_floating_point():
            centred.round_()  # whole numbers but for the last bits
    return centred.T.to(torch.int8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [rows, width] as the payload of a linear, uint8 [rows * row_bytes]."""
    rows, width = codes.shape
    packed = torch.empty(rows, row_bytes(width, bits), dtype=torch.uint8, device=codes.device)
    step = max(1, CHUNK // max(width, 1))
    for a in range(0, rows, step):
        packed[a : a + step] = pack_bits(codes[a : a + step], bits)
    return packed.view(-1)


def unpack_codes(get: Callable[[str], Tensor], bits: int, rows: int, width: int, start: int, stop: int) -> Tensor:
    """Codes int8 of rows [start, stop) of a payload of [rows, width] codes."""
    return unpack_bits(get("").view(rows, -1)[start:stop], bits, width)


def from_plain(plain: Mapping[str, Any]) -> IntegerFormat:
    """Undo `IntegerFormat.plain`."""
    return IntegerFormat(plain["bits"], plain["symmetric"], plain["group_size"], dtype_of(plain["scale_dtype"]))


def group_of(target: Target) -> int:
    """The group size of a resolved target: -1 per row, 0 per tensor. Raises PlanError while it is "auto"."""
    named = {"channel": -1, "tensor": 0}
    size = named.get(target.group_size) if isinstance(target.group_size, str) else target.group_size
    if size is None:
        raise PlanError("the group size 'auto' must be resolved for the widths first: give a number")
    return size


def scale_dtype_of(target: Target) -> torch.dtype:
    """The type that a target names for scales ("auto": float16). Raises PlanError for a kind that is no float type."""
    if target.scale_dtype != "auto" and target.scale_dtype not in DTYPES:
        raise PlanError(
            f"scales of kind '{target.scale_dtype}' are not possible here: choose float16, bfloat16 or float32"
        )
    return DTYPES.get(target.scale_dtype, torch.float16)


def from_target(target: Target) -> IntegerFormat:
    """The integers that a resolved target asks for; scales in the type it names ("auto": float16).

    Raises PlanError when the target names another format, no bits or another kind of scales, or its group size still is
    "auto".
    """
    if target.format != "int":
        raise PlanError(f"only integer grids are possible here, not '{target.format}': leave out target.format")
    if target.bits is None:
        raise PlanError("a quantizing step needs the number of bits: set target.bits to 2..8")
    return IntegerFormat(target.bits, target.symmetric, group_of(target), scale_dtype_of(target))


FAMILY = Family(wanted={}, written={"int": from_plain})  # wanted by the name that `nested` has
