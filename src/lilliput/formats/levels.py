"""Sorted levels times a scale for each group, row or matrix: NormalFloat, dynamic tree, small floats, own tables.

A code is the index of a level less 2^(bits-1), and value = level * scale, computed in float32 from the scale as a file
holds it (`formats.scales`). The index is that of the nearest level to w * (1 / scale).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lilliput.algebra import ranges
from lilliput.algebra.obs import Rounding
from lilliput.errors import PlanError
from lilliput.formats import groups, level_search, scales, tables
from lilliput.formats.bits import row_bytes
from lilliput.formats.format import Family, Format, RangeRule, Stored
from lilliput.formats.integer import IntegerGrid, group_of, pack_codes, unpack_codes
from lilliput.formats.scales import FloatScales, PowerScales, ScaleKind, Scales
from lilliput.machine.cost import Cost
from lilliput.target import Target

_CHUNK = 1 << 17  # weights looked up at a time
_COLUMNS = 16  # of a sweep, looked up at a time
_BYTES = 50  # that a weight which is looked up takes meanwhile, at most


@dataclass(frozen=True)
class LevelFormat(Format):
    """Levels of the table `table`: a name of `tables.MADE` or `tables.FLOATS`, or "custom" with its own `levels`.

    `group_size`: -1 one scale per output row, 0 one for the matrix, else inputs per group.

    Raises PlanError for bits that the table does not have, levels that do not rise through 0 from below it to above,
    and groups that the kind of scales cannot serve.
    """

    table: str
    bits: int
    group_size: int
    scales: ScaleKind
    levels: tuple[float, ...] = ()
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.table in tables.FLOATS and self.bits != tables.FLOATS[self.table].bits:
            raise PlanError(f"{self.table} has {tables.FLOATS[self.table].bits} bits, not {self.bits}: leave out bits")
        if not 2 <= self.bits <= 8:
            raise PlanError(f"{self.bits} bits: tables of levels have 2 to 8 bits; choose one of those")
        if not self.symmetric:
            raise PlanError(f"{self.describe()}: levels have no zero points; leave out symmetric, or take format int")
        if self.table == "custom":
            rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
            if not (rising and 0.0 in self.levels and self.levels[0] < 0 < self.levels[-1]):
                raise PlanError("levels must rise from below 0, through 0, to above 0")
            if len(self.levels) > 1 << self.bits:
                raise PlanError(f"{len(self.levels)} levels do not fit {self.bits} bits: give {1 << self.bits} at most")
        elif self.table not in tables.MADE and self.table not in tables.FLOATS:
            raise PlanError(f"no table of levels is called '{self.table}'")
        check_group(self.group_size, self.scales)

    def describe(self) -> str:
        """For tables: "nf4 g64", "e2m1 g32 e8m0 scales"."""
        unit = {-1: "row", 0: "tensor"}.get(self.group_size, f"g{self.group_size}")
        name = self.table if self.table in tables.FLOATS else f"{self.table}{self.bits}"
        return f"{name} {unit}{describe_scales(self.scales)}"

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size: codes and scales."""
        return rows * width * self.bits + self.scales.size_bits(*groups.units(rows, width, self.group_size))

    def cost(self, rows: int, width: int) -> Cost:
        """Looking for the scales of a [rows, width] matrix."""
        return Cost(ram=_BYTES * min(level_search.CHUNK, rows * width))

    def fit(
        self,
        weight: Tensor,
        *,
        search: Literal["minmax", "mse"] = "minmax",
        importance: Tensor | None = None,
        steps: int = 30,
        norm: float = 2.0,
    ) -> Scales:
        """The scales for `weight` [out, in].

        "minmax": the largest weight of a group falls on the outermost level; e8m0 scales follow the rule of their
        specification, floor(log2 max|w|) less the exponent of the largest level, which may clip the largest weights.
        "mse" looks for the least sum of importance * |error|^norm of each group, among `steps` shrunk scales, their
        least-squares values and the neighbours of their codes. `importance` [in] or [out, in] is not negative.

        Raises LilliputError for NaN or infinity in the weight or importance, and for a scale above its kind.
        """
        weight = weight.float()
        weighed = level_search.Weighed(weight, self.group_size, ranges.relative(weight, importance), norm)
        table = self.on(weight)
        peak = level_search.cover(weighed, table)
        ranges.check(weight, peak, "float32")
        kind = self.scales
        if search == "minmax":
            grid = Scales(kind, kind.coded(peak, table.top, second := kind.second(peak, table.top)), second)
        elif isinstance(kind, FloatScales):
            best = level_search.shrink(weighed, table, peak, kind.dtype, steps, self._shortest)
            grid = Scales(kind, best.to(kind.dtype))
        else:
            ideal = None
            if not isinstance(kind, PowerScales):  # an octave apart, the neighbours are all there is
                ideal = level_search.shrink(weighed, table, peak, torch.float32, steps, self._shortest) * table.top
            grid = scales.choose(kind, peak, ideal, table.top, lambda s: level_search.error(weighed, table, s))
        ranges.check(weight, grid.values(), kind.name)
        return grid

    def searched(
        self, weight: Tensor, how: RangeRule, *, importance: Tensor | None = None, support: Tensor | None = None
    ) -> Scales:
        """See `Format`."""
        return self.fit(weight, search=how.search, importance=importance, steps=how.steps, norm=how.norm)

    def magnitudes(self) -> Tensor:
        """See `ranged.Ranged`."""
        levels = self.on(torch.empty(0)).levels
        return levels[levels >= 0]

    def sweep_grid(self, grid: Scales) -> tuple[IntegerGrid, torch.dtype | None]:
        """See `swept.Sweepable`."""
        moves = self._moves
        return IntegerGrid(grid.values() if moves is None else grid.codes.clone()), moves

    def swept_grid(self, swept: IntegerGrid, grid: Scales) -> Scales:
        """See `swept.Sweepable`."""
        return grid if self._moves is None else Scales(grid.kind, swept.scale)

    def sweep_rounding(self, swept: IntegerGrid, rows: int, group: Sequence[int]) -> Rounding:
        """See `swept.Sweepable`."""
        return Rounding.levels(swept.scale, self.on(swept.scale).snap, rows, group)

    def swept_codes(self, centred: Tensor, swept: IntegerGrid, group: Sequence[int]) -> Tensor:
        """See `swept.Sweepable`."""
        table, half = self.on(centred), 1 << (self.bits - 1)
        codes = torch.empty(centred.shape, dtype=torch.int8, device=centred.device)
        for a in range(0, len(centred), _COLUMNS):
            codes[a : a + _COLUMNS] = (table.index(centred[a : a + _COLUMNS]) - half).to(torch.int8)
        return codes.T

    def encode(self, weight: Tensor, grid: Scales) -> Tensor:
        """The nearest codes, int8 [out, in]. Ties go to the even mantissa of a small float, else to the lower level."""
        table, half = self.on(weight), 1 << (self.bits - 1)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for rows, columns, scale, size in self._units(grid, codes):
            value = groups.split(weight[rows, columns].float(), size) * scale.reciprocal()
            codes[rows, columns] = (table.index(value) - half).flatten(1).to(torch.int8)
        return codes

    def decode(self, codes: Tensor, grid: Scales) -> Tensor:
        """The values of codes [out, in], float32."""
        levels, half = self.on(codes).levels, 1 << (self.bits - 1)
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows, columns, scale, size in self._units(grid, codes):
            level = levels[codes[rows, columns].to(torch.int64) + half]
            torch.mul(groups.split(level, size), scale, out=groups.split(out[rows, columns], size))
        return out

    def stored(self, rows: int, width: int) -> Stored:
        """See docs/native-format.md, kind "levels"."""
        own = self.scales.stored(*groups.units(rows, width, self.group_size))
        payload = (torch.uint8, (rows * row_bytes(width, self.bits),))
        return {"": payload, **{f"_scale{suffix}": x for suffix, x in own.items()}}

    def pack(self, codes: Tensor, grid: Scales) -> dict[str, Tensor]:
        """The tensors that `stored` describes."""
        own = grid.kind.pack(grid.codes, grid.second)
        return {"": pack_codes(codes, self.bits), **{f"_scale{suffix}": x for suffix, x in own.items()}}

    def unpack(
        self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int
    ) -> tuple[Tensor, Scales]:
        """Codes and scales of rows [start, stop) of a [rows, width] matrix; `get` returns a stored tensor by suffix."""
        units = groups.units(rows, width, self.group_size)
        return unpack_codes(get, self.bits, rows, width, start, stop), scales.unpack(
            self.scales, get, units, start, stop
        )

    def plain(self) -> dict[str, Any]:
        """The entry of config.json."""
        entry: dict[str, Any] = {"kind": "levels", "table": self.table, "bits": self.bits}
        entry |= {"group_size": self.group_size, "scales": self.scales.name}
        return {**entry, "levels": list(self.levels)} if self.levels else entry

    def on(self, like: Tensor) -> tables.Table:
        """The levels on a tensor's device."""
        return tables.of(self.table, self.bits, self.levels, str(like.device))

    @property
    def _moves(self) -> torch.dtype | None:
        return self.scales.dtype if isinstance(self.scales, FloatScales) and self.group_size != 0 else None

    @property
    def _shortest(self) -> float:
        return min(0.9, 0.1 + 0.1 * self.bits)

    def _units(self, grid: Scales, codes: Tensor) -> Iterator[tuple[slice, slice, Tensor, int]]:
        """Rows and columns, few at a time because indices are wide, with their scales [rows, groups, 1]."""
        count, width = codes.shape
        scale = grid.values()
        step = max(1, _CHUNK // max(width, 1))
        for columns, some, size in groups.pieces(width, self.group_size):
            for a in range(0, count, step):
                rows = slice(a, min(a + step, count))
                own = scale if self.group_size == 0 else scale[rows, some]
                yield rows, columns, own.unsqueeze(-1), size


def describe_scales(kind: ScaleKind) -> str:
    """What a description adds for scales that are no plain floats."""
    return "" if isinstance(kind, FloatScales) else f" {kind.name} scales"


def check_group(size: int, kind: ScaleKind) -> None:
    """Raises PlanError for groups that a kind of scales cannot serve."""
    if size < -1:
        raise PlanError(f"group size {size}: give a positive number, 0 (per tensor) or -1 (per row)")
    if size == 0 and not isinstance(kind, FloatScales | PowerScales):
        raise PlanError(f"one scale per tensor cannot be '{kind.name}': give a group size, or scale_dtype float16")
    if size < 0 and kind.shared == "row":
        raise PlanError(f"one scale per row cannot be '{kind.name}': give a group size, or scale_dtype float16")


@dataclass(frozen=True)
class Preset:
    """What a name in `Target.format` stands for; bits None: the target decides. Group and scales are defaults, and the
    only ones possible where they are `fixed`."""

    table: str
    bits: int | None
    group: int | Literal["channel"]
    scales: str = "auto"
    fixed: bool = False


PRESETS: Mapping[str, Preset] = {
    "nf": Preset("nf", None, 64),
    "nf2": Preset("nf", 2, 64),
    "nf3": Preset("nf", 3, 64),
    "nf4": Preset("nf", 4, 64),
    "dynamic8": Preset("dynamic", 8, 2048, "float32"),
    "fp4": Preset("e2m1", 4, 32),
    "e2m1": Preset("e2m1", 4, 32),
    "fp6": Preset("e2m3", 6, 32),
    "e2m3": Preset("e2m3", 6, 32),
    "e3m2": Preset("e3m2", 6, 32),
    "fp8": Preset("e4m3", 8, "channel", "float32"),
    "e4m3": Preset("e4m3", 8, "channel", "float32"),
    "e5m2": Preset("e5m2", 8, "channel", "float32"),
    "mxfp4": Preset("e2m1", 4, 32, "e8m0", fixed=True),
    "mxfp6": Preset("e2m3", 6, 32, "e8m0", fixed=True),
    "mxfp6-e3m2": Preset("e3m2", 6, 32, "e8m0", fixed=True),
    "mxfp8": Preset("e4m3", 8, 32, "e8m0", fixed=True),
    "mxfp8-e5m2": Preset("e5m2", 8, 32, "e8m0", fixed=True),
    "nvfp4": Preset("e2m1", 4, 16, "e4m3", fixed=True),
}


def completed(target: Target) -> Target:
    """The target with what its format's name says: bits, group size and kind of scales.

    Raises PlanError where the target says otherwise.
    """
    preset = PRESETS[target.format]
    name = target.format
    update: dict[str, Any] = {}
    if preset.bits is not None and target.bits not in (None, preset.bits):
        raise PlanError(
            f"'{name}' has {preset.bits} bits, not {target.bits}: leave out bits, or set them to {preset.bits}"
        )
    if target.bits is None:
        update["bits"] = preset.bits or 4
    if target.group_size == "auto":
        update["group_size"] = preset.group
    elif preset.fixed and target.group_size != preset.group:
        raise PlanError(
            f"'{name}' has groups of {preset.group}, not {target.group_size}: leave out group_size, or take format "
            f"{preset.table} with scale_dtype {preset.scales}"
        )
    if target.scale_dtype == "auto":
        update["scale_dtype"] = preset.scales
    elif preset.fixed and target.scale_dtype != preset.scales:
        raise PlanError(
            f"'{name}' has {preset.scales} scales, not {target.scale_dtype}: leave out scale_dtype, or take format "
            f"{preset.table}"
        )
    return target.model_copy(update=update)


def from_target(target: Target) -> LevelFormat:
    """The levels that a resolved target asks for. Raises PlanError where they cannot be had as it says."""
    full = completed(target)
    preset = PRESETS[target.format]
    return LevelFormat(
        preset.table, full.bits or 4, group_of(full), scales.parse(full.scale_dtype), symmetric=target.symmetric
    )


def from_plain(plain: Mapping[str, Any]) -> LevelFormat:
    """Undo `LevelFormat.plain`."""
    kind = scales.from_plain(plain["scales"])
    return LevelFormat(plain["table"], plain["bits"], plain["group_size"], kind, tuple(plain.get("levels", ())))


FAMILY = Family(
    wanted=dict.fromkeys(PRESETS, from_target),
    written={"levels": from_plain},
    completed=completed,
    zero_points=True,  # which `LevelFormat` refuses with the levels' own words
    swept=True,
)
