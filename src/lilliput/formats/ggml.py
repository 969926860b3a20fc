"""The grids of ggml, whose stored payload is exactly the blocks of a GGUF file: see `formats.ggml_bytes`.

Blocks do not cross rows, so a row's width has to be a multiple of the block; `fitting` names the type that takes the
place of a super-block where it is not, as in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lilliput.algebra import ranges
from lilliput.algebra.obs import Rounding
from lilliput.errors import PlanError, SourceError
from lilliput.formats import ggml_bytes, ggml_search, integer, tables
from lilliput.formats.format import Family, Format, RangeRule, Stored
from lilliput.formats.ggml_bytes import KINDS, Blocks, Kind
from lilliput.machine.cost import Cost
from lilliput.target import Target

_CHUNK = 1 << 17  # weights fitted at a time
_BYTES = 40  # that a weight which is fitted takes meanwhile, at most
_COLUMNS = 16  # looked up at a time
_NOMINAL = {"tq1_0": None, "tq2_0": 2}  # bits that a name does not say


@dataclass(frozen=True)
class GgmlGrid:
    """Scales of the blocks: d, m float16 [out, blocks]; scales, minima int16 [out, groups]; None where a type has
    none."""

    d: Tensor
    m: Tensor | None = None
    scales: Tensor | None = None
    minima: Tensor | None = None

    def rows(self, start: int, stop: int) -> GgmlGrid:
        """The grid of output rows [start, stop)."""
        m, scales, minima = (None if x is None else x[start:stop] for x in (self.m, self.scales, self.minima))
        return GgmlGrid(self.d[start:stop], m, scales, minima)


@dataclass(frozen=True)
class GgmlFormat(Format):
    """The type `name`, a key of `KINDS`. Codes are int8 [out, in]: whole numbers, or indices of a table's levels."""

    holds_zero: ClassVar[bool] = False

    name: str

    @property
    def bits(self) -> int:
        """Bits of a code, rounded up."""
        return (self.kind.highest - self.kind.lowest).bit_length()

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.kind.group

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return self.kind.lowest

    @property
    def highest(self) -> int:
        """The largest code."""
        return self.kind.highest

    @property
    def symmetric(self) -> bool:
        """Whether there are no offsets."""
        return not self.kind.offset

    def groups(self, width: int) -> int:
        """Groups in a row of `width` inputs."""
        return width // self.kind.group

    def group_of(self, width: int, device: torch.device | str = "cpu") -> Tensor:
        """The group of each input, int64 [width]."""
        return torch.arange(width, device=device) // self.kind.group

    def describe(self) -> str:
        """For tables: "q4_k"."""
        return self.name

    def check(self, rows: int, width: int) -> None:
        """Raises PlanError for a width that the blocks do not divide."""
        if width % self.kind.block:
            raise PlanError(
                f"{self.name} needs rows of a multiple of {self.kind.block} inputs, and one has {width}: exclude this "
                "layer, which then stays in 16 bits"
            )

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size."""
        return 8 * rows * self.row_bytes(width)

    def row_bytes(self, width: int) -> int:
        """Bytes of a row."""
        return width // self.kind.block * self.kind.bytes

    def cost(self, rows: int, width: int) -> Cost:
        """See `Format`."""
        return Cost(ram=_BYTES * min(rows * width, max(_CHUNK, width)))

    def fit(
        self, weight: Tensor, *, importance: Tensor | None = None, search: str = "mse", steps: int = 24
    ) -> GgmlGrid:
        """The scales for `weight` [out, in]: "minmax" covers each group's range, "mse" looks for the least sum of
        importance * error^2, trying `steps` ranges. `importance` [in] or [out, in] is not negative.

        Raises LilliputError for NaN or infinity in the weight or importance, and for a scale above float16.
        """
        weight = weight.float()
        rows, width = weight.shape
        self.check(rows, width)
        kind, weigh = self.kind, ranges.relative(weight, importance)
        shape = (-1, width // kind.block, kind.groups, kind.group)
        d = torch.empty(rows, width // kind.block, dtype=torch.float16, device=weight.device)
        c = torch.empty(rows, width // kind.group, dtype=torch.int16, device=weight.device)
        m, e = torch.empty_like(d), torch.empty_like(c)
        step = max(1, _CHUNK // max(width, 1))
        for a in range(0, rows, step):
            part = slice(a, a + step)
            h = None if weigh is None else (weigh if len(weigh) == 1 else weigh[part]).reshape(shape)
            attempt = ggml_search.Search(kind, weight[part].reshape(shape), h, steps)
            best = attempt.cover() if search == "minmax" else attempt.best()
            count = len(d[part])
            ranges.check(weight[part], best.d.half() + best.m.half(), "float16")
            d[part], m[part] = best.d.view(count, -1).half(), best.m.view(count, -1).half()
            c[part], e[part] = (x.view(count, -1).to(torch.int16) for x in (best.c, best.e))
        if kind.offset == "code":
            return GgmlGrid(d, -m, c, e)
        return GgmlGrid(d, m if kind.offset else None, None if kind.scales is None else c)

    def searched(
        self, weight: Tensor, how: RangeRule, *, importance: Tensor | None = None, support: Tensor | None = None
    ) -> GgmlGrid:
        """See `Format`; errors are squared, whatever the norm."""
        return self.fit(weight, importance=importance, search=how.search, steps=how.steps)

    def sweep_grid(self, grid: GgmlGrid) -> tuple[integer.IntegerGrid, torch.dtype | None]:
        """See `swept.Sweepable`."""
        scale, offset = self.values(grid)
        return integer.IntegerGrid(scale, None if offset is None else -offset / scale), None

    def swept_grid(self, swept: integer.IntegerGrid, grid: GgmlGrid) -> GgmlGrid:
        """See `swept.Sweepable`."""
        return grid

    def sweep_rounding(self, swept: integer.IntegerGrid, rows: int, group: Sequence[int]) -> Rounding:
        """See `swept.Sweepable`."""
        table = self.table(swept.scale)
        if table is not None:
            return Rounding.levels(swept.scale, table.snap, rows, group)
        step = swept.scale.expand(rows, -1).T.contiguous()
        inverse, lowest, highest = step.reciprocal().unbind(0), float(self.kind.lowest), float(self.kind.highest)
        if swept.zero is None:
            return Rounding(inverse, step.unbind(0), (), (), group, (lowest, highest))
        zero = swept.zero.expand(rows, -1).T.contiguous()
        low, high = (lowest - zero).unbind(0), (highest - zero).unbind(0)
        return Rounding(inverse, step.unbind(0), low, high, group, part=(zero - zero.round()).unbind(0))

    def swept_codes(self, centred: Tensor, swept: integer.IntegerGrid, group: Sequence[int]) -> Tensor:
        """See `swept.Sweepable`."""
        table = self.table(centred)
        if table is None:
            return integer.uncentred(centred, swept.zero, group)
        codes = torch.empty(centred.shape, dtype=torch.int8, device=centred.device)
        for a in range(0, len(centred), _COLUMNS):
            codes[a : a + _COLUMNS] = table.index(centred[a : a + _COLUMNS]).to(torch.int8)
        return codes.T

    def levels(self, device: torch.device | str) -> Tensor | None:
        """See `rounding.Trainable`."""
        table = self.table(torch.empty(0, device=device))
        return None if table is None else table.levels

    def opened(self, grid: GgmlGrid) -> tuple[Tensor, Tensor]:
        """See `rounding.Trainable`."""
        scale, offset = self.values(grid)
        return scale, torch.zeros_like(scale) if offset is None else -offset / scale

    def nearest(self, scale: Tensor, zero: Tensor, grid: GgmlGrid) -> tuple[Tensor, Tensor]:
        """See `rounding.Trainable`: what super-blocks share stays, and the integers move."""
        return self.opened(self.closed(scale, zero, grid))

    def closed(self, scale: Tensor, zero: Tensor, grid: GgmlGrid) -> GgmlGrid:
        """See `rounding.Trainable`."""
        kind = self.kind
        if kind.scales is None:
            return GgmlGrid(ggml_search.half(scale).half(), (-zero * scale).half() if kind.offset else None)
        low, high = kind.scales
        step = grid.d.float().repeat_interleave(kind.groups, 1)
        codes = (scale / step).round_().clamp_(low, high)
        codes = torch.where(codes == 0, 1.0, codes)
        if grid.m is None:
            return GgmlGrid(grid.d, None, codes.to(torch.int16))
        by = grid.m.float().repeat_interleave(kind.groups, 1)
        minima = torch.where(by > 0, zero * scale / by, 0.0).round_().clamp_(0, high)
        return GgmlGrid(grid.d, grid.m, codes.to(torch.int16), minima.to(torch.int16))

    def values(self, grid: GgmlGrid) -> tuple[Tensor, Tensor | None]:
        """Scale and offset of each group, float32 [out, groups]: value = code * scale + offset."""
        per = self.kind.groups
        scale, offset = grid.d.float(), None
        if grid.scales is not None:
            scale = scale.repeat_interleave(per, 1) * grid.scales
        if grid.m is not None:
            offset = grid.m.float()
            if grid.minima is not None:
                offset = -(offset.repeat_interleave(per, 1) * grid.minima)
        return scale, offset

    def encode(self, weight: Tensor, grid: GgmlGrid) -> Tensor:
        """The nearest codes, int8 [out, in]."""
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        table = self.table(weight)
        for part, scale, offset in self._rows(grid, codes):
            x = weight[part].float().reshape(len(scale), -1, self.group_size)
            x = (x if offset is None else x - offset).mul(torch.where(scale == 0, 0.0, 1 / scale))
            nearest = table.index(x) if table is not None else x.round_().clamp_(self.kind.lowest, self.kind.highest)
            codes[part] = nearest.to(torch.int8).view(len(scale), -1)
        return codes

    def decode(self, codes: Tensor, grid: GgmlGrid) -> Tensor:
        """The values of codes [out, in], float32, each rounded once."""
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        table = self.table(codes)
        for part, scale, offset in self._rows(grid, codes):
            code = codes[part].reshape(len(scale), -1, self.group_size)
            value = (code.float() if table is None else table.levels[code.long()]).mul_(scale)
            out[part] = (value if offset is None else value.add_(offset)).view(len(scale), -1)
        return out

    def stored(self, rows: int, width: int) -> Stored:
        """See docs/native-format.md, kind "ggml"."""
        return {"": (torch.uint8, (rows * self.row_bytes(width),))}

    def pack(self, codes: Tensor, grid: GgmlGrid) -> dict[str, Tensor]:
        """The blocks of a GGUF file, row after row."""
        parts = [
            ggml_bytes.pack(self.kind, Blocks(codes[part], **vars(grid.rows(part.start, part.stop))))
            for part in _slices(codes)
        ]
        return {"": torch.cat(parts).view(-1) if parts else torch.empty(0, dtype=torch.uint8)}

    def unpack(
        self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int
    ) -> tuple[Tensor, GgmlGrid]:
        """Codes and grid of rows [start, stop) of a [rows, width] matrix; `get` returns a stored tensor by suffix."""
        content = ggml_bytes.unpack(self.kind, get("").view(rows, -1)[start:stop])
        return content.codes, GgmlGrid(content.d, content.m, content.scales, content.minima)

    def plain(self) -> dict[str, Any]:
        """The entry of config.json."""
        return {"kind": "ggml", "type": self.name}

    def table(self, like: Tensor) -> tables.Table | None:
        """The levels on a tensor's device; None where codes are whole numbers."""
        levels = tuple(float(x) for x in self.kind.table)
        return tables.of("custom", 4, levels, str(like.device)) if levels else None

    def _rows(self, grid: GgmlGrid, codes: Tensor) -> list[tuple[slice, Tensor, Tensor | None]]:
        """Few rows at a time with scale and offset [rows, groups, 1]."""
        scale, offset = self.values(grid)
        return [
            (part, scale[part].unsqueeze(-1), None if offset is None else offset[part].unsqueeze(-1))
            for part in _slices(codes)
        ]


@dataclass(frozen=True)
class ZeroedFormat(GgmlFormat):
    """A type whose every grid has 0."""

    holds_zero: ClassVar[bool] = True


def format_of(name: str) -> GgmlFormat:
    """The format of a type."""
    return GgmlFormat(name) if KINDS[name].offset or KINDS[name].table else ZeroedFormat(name)


def _slices(codes: Tensor) -> list[slice]:
    step = max(1, _CHUNK // max(codes.shape[1], 1))
    return [slice(a, min(a + step, len(codes))) for a in range(0, len(codes), step)]


def completed(target: Target) -> Target:
    """The target with the bits that the type's name says. Raises PlanError where it says more than the name."""
    name = target.format
    bits = _NOMINAL[name] if name in _NOMINAL else int(name.strip("iq")[0])
    if target.bits not in (None, bits):
        raise PlanError(f"'{name}' has its bits by its name: leave out bits, or take format int")
    if target.group_size != "auto":
        raise PlanError(f"'{name}' has groups of {KINDS[name].group} by its nature: leave out group_size")
    if target.scale_dtype != "auto":
        raise PlanError(f"'{name}' has scales of its own: leave out scale_dtype")
    if not target.symmetric:
        raise PlanError(f"'{name}' says by its name whether there are offsets: leave out symmetric")
    return target.model_copy(update={"bits": bits})


def fitting(target: Target, width: int) -> Target:
    """The target for rows of `width` inputs: another type where the blocks of its own do not divide them."""
    narrow = KINDS[target.format].narrow
    if width % KINDS[target.format].block == 0 or not narrow:
        return target
    bits = completed(Target(format=narrow)).bits
    return target.model_copy(update={"format": narrow, "bits": bits})


def from_target(target: Target) -> GgmlFormat:
    """The type that a target names."""
    return format_of(target.format)


def from_plain(plain: Mapping[str, Any]) -> GgmlFormat:
    """Undo `GgmlFormat.plain`. Raises SourceError for a type that this code does not know."""
    if plain["type"] not in KINDS:
        raise SourceError(
            f"blocks of type {plain['type']!r} are newer than this lilliput: install the one that wrote it"
        )
    return format_of(plain["type"])


FAMILY = Family(
    wanted=dict.fromkeys(KINDS, from_target),
    written={"ggml": from_plain},
    completed=completed,
    zero_points=True,  # which `completed` refuses with words of its own
    swept=True,
)
