"""Integers with real zero points: value = (code - zero) * scale, zero a float stored like the scale (HQQ, TinyChat).

Any range can be covered, also one without 0 inside, and both numbers of a group can be fitted without rounding them to
codes. A weight that has to be exactly 0 may find no code for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lilliput.algebra import ranges
from lilliput.algebra.obs import Rounding
from lilliput.errors import PlanError
from lilliput.formats import groups, integer
from lilliput.formats.bits import row_bytes
from lilliput.formats.format import Family, Format, RangeRule, Stored, dtype_name, dtype_of
from lilliput.formats.integer import IntegerFormat, pack_codes, uncentred, unpack_codes
from lilliput.target import Target

_CHUNK = 1 << 18  # weights fitted at a time
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of the range, about its middle, that a fit begins with
_ROUNDS = 4  # of least squares after it
_FAR = 2.0  # windows of codes that a zero point may lie away from 0: 16 bits hold it finely up to there


@dataclass(frozen=True)
class AffineGrid:
    """`scale`, positive, and `zero`, in code units: [out, groups] in the format's scale dtype."""

    scale: Tensor
    zero: Tensor

    def rows(self, start: int, stop: int) -> AffineGrid:
        """The grid of output rows [start, stop)."""
        return AffineGrid(self.scale[start:stop], self.zero[start:stop])


@dataclass(frozen=True)
class AffineFormat(Format):
    """Integers of `bits` bits, 2 to 8; `group_size`: -1 one scale and zero per output row, else inputs per group.

    Raises PlanError for other bits, a group size of 0 or below -1, or a scale dtype that is no float of 16 or 32 bits.
    """

    holds_zero: ClassVar[bool] = False

    bits: int
    group_size: int
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        _ = self.codes  # checks bits, group size and scale dtype
        if self.group_size == 0:
            raise PlanError("real zero points belong to groups or rows: give a positive group size or 'channel'")

    @property
    def codes(self) -> IntegerFormat:
        """The same codes with integer zero points."""
        return IntegerFormat(self.bits, False, self.group_size, self.scale_dtype)

    def describe(self) -> str:
        """For tables: "affine4 g64"."""
        return f"affine{self.bits} {'row' if self.group_size < 0 else f'g{self.group_size}'}"

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size: codes, scales and zero points."""
        return (
            rows * width * self.bits + 2 * rows * groups.count(width, self.group_size) * self.scale_dtype.itemsize * 8
        )

    def fit(self, weight: Tensor, *, importance: Tensor | None = None, search: bool = True) -> AffineGrid:
        """The grid for `weight` [out, in].

        Without `search` the one that covers each group. With it a few shares of that range are tried, and from the best
        least squares for the codes at hand and the codes of that grid take turns; of all grids seen each group keeps
        the one of least sum of importance * error^2. A group of equal weights is held exactly, but for the scale's
        rounding.

        Raises LilliputError for NaN or infinity in the weight or importance, and for a scale above the scale dtype.
        """
        weight = weight.float()
        weigh = ranges.relative(weight, importance)
        rows, width = weight.shape
        scale = weight.new_empty(rows, groups.count(width, self.group_size))
        zero = torch.empty_like(scale)
        step = max(1, _CHUNK // max(width, 1))
        for columns, some, size in groups.pieces(width, self.group_size):
            for a in range(0, rows, step):
                part = slice(a, a + step)
                h = None
                if weigh is not None:
                    h = groups.split((weigh if weigh.shape[0] == 1 else weigh[part])[:, columns], size)
                scale[part, some], zero[part, some] = self._fit(groups.split(weight[part, columns], size), h, search)
        ranges.check(weight, scale, dtype_name(self.scale_dtype))
        return AffineGrid(scale.to(self.scale_dtype), zero.to(self.scale_dtype))

    def searched(
        self, weight: Tensor, how: RangeRule, *, importance: Tensor | None = None, support: Tensor | None = None
    ) -> AffineGrid:
        """See `Format`."""
        return self.fit(weight, importance=importance, search=how.search == "mse")

    def even(self, weight: Tensor, reach: float) -> AffineGrid:
        """See `ranged.Spaced`."""
        units = groups.units(weight.shape[0], weight.shape[1], self.group_size)
        step = 2 * reach * weight.square().mean().sqrt() / ((1 << self.bits) - 1)
        scale = ranges.stored(step.reshape(1, 1), self.scale_dtype).to(self.scale_dtype).expand(units).contiguous()
        return AffineGrid(scale, torch.full_like(scale, -0.5))

    def sweep_grid(self, grid: AffineGrid) -> tuple[integer.IntegerGrid, torch.dtype | None]:
        """See `swept.Sweepable`."""
        return integer.IntegerGrid(grid.scale.clone(), grid.zero), self.scale_dtype

    def swept_grid(self, swept: integer.IntegerGrid, grid: AffineGrid) -> AffineGrid:
        """See `swept.Sweepable`."""
        return AffineGrid(swept.scale, grid.zero)

    def sweep_rounding(self, swept: integer.IntegerGrid, rows: int, group: Sequence[int]) -> Rounding:
        """See `swept.Sweepable`."""
        return Rounding.of(swept.scale, swept.zero, self.bits, rows, group)

    def swept_codes(self, centred: Tensor, swept: integer.IntegerGrid, group: Sequence[int]) -> Tensor:
        """See `swept.Sweepable`."""
        return uncentred(centred, swept.zero, group)

    def _fit(self, w: Tensor, h: Tensor | None, search: bool) -> tuple[Tensor, Tensor]:
        """Scale and zero, both as stored, float32 [rows, groups] for groups w [rows, groups, size]."""
        low, high = w.amin(-1), w.amax(-1)
        best = self._grid(low, high)
        if not search:
            return best
        least = self._loss(w, h, best)[0]

        def take(trial: tuple[Tensor, Tensor]) -> None:
            nonlocal best, least
            loss, _ = self._loss(w, h, trial)
            better = loss < least
            best = torch.where(better, trial[0], best[0]), torch.where(better, trial[1], best[1])
            least = torch.where(better, loss, least)

        middle, half = (low + high) / 2, (high - low) / 2
        for share in _SHARES[1:]:
            take(self._grid(middle - share * half, middle + share * half))
        for _ in range(_ROUNDS):
            take(self._regressed(w, h, best))
        return best

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero, as stored, whose codes reach from low to high."""
        form = self.codes
        step = (high - low) / (form.highest - form.lowest)
        far = torch.maximum(low.abs(), high.abs()) / (_FAR * (form.highest - form.lowest))
        scale = ranges.stored(torch.maximum(step, far), self.scale_dtype)
        return scale, (form.lowest - low / scale).to(self.scale_dtype).float()

    def _codes(self, w: Tensor, grid: tuple[Tensor, Tensor]) -> Tensor:
        scale, zero = (x.unsqueeze(-1) for x in grid)
        code = torch.addcmul(zero, w, scale.reciprocal()).round_()
        return code.clamp_(self.codes.lowest, self.codes.highest)

    def _loss(self, w: Tensor, h: Tensor | None, grid: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        code = self._codes(w, grid)
        miss = (code - grid[1].unsqueeze(-1)).mul_(grid[0].unsqueeze(-1)).sub_(w).square_()
        return (miss if h is None else miss.mul_(h)).sum(-1), code

    def _regressed(self, w: Tensor, h: Tensor | None, grid: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Least squares of w on the codes of `grid`: w ~ scale * (code - zero); unchanged where all codes are one."""
        code = self._codes(w, grid)
        count = torch.full_like(grid[0], w.shape[-1]) if h is None else h.expand_as(w).sum(-1)
        some = torch.where(count > 0, count, 1.0)
        mean_code = (code if h is None else code * h).sum(-1) / some
        mean = (w if h is None else w * h).sum(-1) / some
        off = code - mean_code.unsqueeze(-1)
        heavy = off if h is None else off * h
        bend, slope = (heavy * off).sum(-1), (heavy * w).sum(-1)
        fine = (bend > 0) & (slope > 0)
        scale = torch.where(fine, ranges.stored(slope / torch.where(fine, bend, 1.0), self.scale_dtype), grid[0])
        zero = (mean_code - mean / scale).to(self.scale_dtype).float()
        near = fine & (zero.abs() <= (1 + _FAR) * (self.codes.highest - self.codes.lowest))
        return torch.where(near, scale, grid[0]), torch.where(near, zero, grid[1])

    def encode(self, weight: Tensor, grid: AffineGrid) -> Tensor:
        """The nearest codes, int8 [out, in]."""
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for columns, scale, zero, size in self._units(grid, weight.shape[1]):
            nearest = self._codes(groups.split(weight[:, columns].float(), size), (scale, zero))
            codes[:, columns] = nearest.flatten(1).to(torch.int8)
        return codes

    def decode(self, codes: Tensor, grid: AffineGrid) -> Tensor:
        """The values of codes [out, in], float32."""
        out = torch.empty(codes.shape, device=codes.device)
        for columns, scale, zero, size in self._units(grid, codes.shape[1]):
            centred = groups.split(codes[:, columns], size) - zero.unsqueeze(-1)
            out[:, columns] = centred.mul_(scale.unsqueeze(-1)).flatten(1)
        return out

    def stored(self, rows: int, width: int) -> Stored:
        """See docs/native-format.md, kind "affine"."""
        units = (self.scale_dtype, (rows, groups.count(width, self.group_size)))
        return {"": (torch.uint8, (rows * row_bytes(width, self.bits),)), "_scale": units, "_zero": units}

    def pack(self, codes: Tensor, grid: AffineGrid) -> dict[str, Tensor]:
        """The tensors that `stored` describes."""
        return {
            "": pack_codes(codes, self.bits),
            "_scale": grid.scale.to(self.scale_dtype).contiguous(),
            "_zero": grid.zero.to(self.scale_dtype).contiguous(),
        }

    def unpack(
        self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int
    ) -> tuple[Tensor, AffineGrid]:
        """Codes and grid of rows [start, stop) of a [rows, width] matrix; `get` returns a stored tensor by suffix."""
        codes = unpack_codes(get, self.bits, rows, width, start, stop)
        return codes, AffineGrid(get("_scale")[start:stop], get("_zero")[start:stop])

    def plain(self) -> dict[str, Any]:
        """The entry of config.json."""
        return {
            "kind": "affine",
            "bits": self.bits,
            "group_size": self.group_size,
            "scale_dtype": dtype_name(self.scale_dtype),
        }

    def _units(self, grid: AffineGrid, width: int) -> Iterator[tuple[slice, Tensor, Tensor, int]]:
        for columns, some, size in groups.pieces(width, self.group_size):
            yield columns, grid.scale[:, some].float(), grid.zero[:, some].float(), size


def from_plain(plain: Mapping[str, Any]) -> AffineFormat:
    """Undo `AffineFormat.plain`."""
    return AffineFormat(plain["bits"], plain["group_size"], dtype_of(plain["scale_dtype"]))


def from_target(target: Target) -> AffineFormat:
    """The format of a resolved target (bits: 4 where it names none). `symmetric` says nothing here: zero points are
    part of the format. Raises PlanError for bits outside 2..8, a grid per tensor, or another kind of scales."""
    return AffineFormat(target.bits or 4, integer.group_of(target), integer.scale_dtype_of(target))


FAMILY = Family(wanted={"affine": from_target}, written={"affine": from_plain}, zero_points=True, swept=True)
