"""Binary coding (BCQ): value = offset + sum_i alpha_i b_i, b_i in {-1, +1}, with alphas and offset for every group.

The 2^b sums are any levels that b alphas span; evenly spaced ones are the case alpha_i = S 2^(i-1),
offset = S ((2^b - 1) / 2 - Z) for a step S and an unsigned zero point Z, i from 0. Bit i of a code (plus 2^(b-1)) is
set where b_i = +1, so that the codes are the bit planes. Alphas and offsets are rounded to their stored type before
anything is encoded.

Xu et al. 2018, arXiv 1802.00150 (alternating); Park et al. 2022, LUT-GEMM, arXiv 2206.09557 (offset and groups).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lilliput.algebra.ranges import relative
from lilliput.errors import LilliputError, PlanError
from lilliput.formats import groups, integer
from lilliput.formats.bits import row_bytes, unpack_bits
from lilliput.formats.format import Family, Format, Stored, dtype_name, dtype_of
from lilliput.formats.integer import SCALE_DTYPES, IntegerFormat, pack_codes
from lilliput.target import Target

_CHUNK = 1 << 17  # weights that are fitted, encoded or decoded at a time
Start = Literal["greedy", "uniform", "best"]


@dataclass(frozen=True)
class BinaryGrid:
    """`alpha` [out, groups, bits] and `offset` [out, groups], in the format's scale dtype."""

    alpha: Tensor
    offset: Tensor

    def rows(self, start: int, stop: int) -> BinaryGrid:
        """The grid of output rows [start, stop)."""
        return BinaryGrid(self.alpha[start:stop], self.offset[start:stop])

    def levels(self) -> Tensor:
        """The value of every unsigned code, float32 [out, groups, 2^bits]."""
        bits = self.alpha.shape[-1]
        codes = torch.arange(1 << bits, device=self.alpha.device)
        out = self.offset.float().unsqueeze(-1).repeat(1, 1, 1 << bits)
        for i in range(bits):
            out += self.alpha[..., i : i + 1].float() * ((codes >> i & 1) * 2 - 1)
        return out


@dataclass(frozen=True)
class BinaryFormat(Format):
    """Sums of `bits` alphas. `group_size`: -1 alphas for each output row, else inputs per group.

    Raises PlanError for bits outside 1..8, a group size of 0 or below -1, or a scale dtype that is no float.
    """

    holds_zero: ClassVar[bool] = False

    bits: int
    group_size: int
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise PlanError(f"{self.bits} bits: binary coding has 1 to 8 bits; choose one of those")
        if self.group_size < -1 or self.group_size == 0:
            raise PlanError("binary coding has alphas for groups or rows: give a positive group size or 'channel'")
        if self.scale_dtype not in SCALE_DTYPES:
            raise PlanError(f"alphas in {self.scale_dtype}: choose float16, bfloat16 or float32")

    def describe(self) -> str:
        """For tables: "binary3 g64"."""
        return f"binary{self.bits} {'row' if self.group_size < 0 else f'g{self.group_size}'}"

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size: codes, and bits + 1 numbers a group."""
        numbers = rows * groups.count(width, self.group_size) * (self.bits + 1)
        return rows * width * self.bits + numbers * self.scale_dtype.itemsize * 8

    def fit(
        self, weight: Tensor, *, importance: Tensor | None = None, start: Start = "best", rounds: int = 15
    ) -> BinaryGrid:
        """Alphas and offsets for `weight` [out, in] of least sum of importance * error^2, found by alternation.

        "greedy": offset the mean, then b_i = sign(r), alpha_i = mean |r|, r -= alpha_i b_i; "uniform": the integer grid
        of least error; "best": the better of them for each group. Each of `rounds` then takes alphas and offset to
        their least-squares values for the codes, and codes to the nearest sums, where the stored result is better: the
        error of no group ever rises. `importance` [in] or [out, in] is not negative; None counts all alike.
        Raises LilliputError for NaN or infinity, and for alphas above the scale dtype.
        """
        rows, width = weight.shape
        weigh = relative(weight, importance)
        if weigh is None:
            weigh = weight.new_ones(1, width)
        if not bool(torch.isfinite(weight.sum())):
            raise LilliputError("the weight contains NaN or infinity: it cannot be quantized")
        step = max(1, _CHUNK // max(width, 1))
        grids = []
        for a in range(0, rows, step):
            some = weigh[a : a + step] if len(weigh) == rows else weigh
            grids.append(self._fit(self._units(weight[a : a + step].float()), self._units(some.float()), start, rounds))
        grid = BinaryGrid(torch.cat([g.alpha for g in grids]), torch.cat([g.offset for g in grids]))
        if not bool(torch.isfinite(grid.alpha).all() and torch.isfinite(grid.offset).all()):
            name = dtype_name(self.scale_dtype)
            raise LilliputError(f"an alpha exceeds the range of {name}: set scale_dtype to float32 for this layer")
        return grid

    def encode(self, weight: Tensor, grid: BinaryGrid) -> Tensor:
        """The nearest codes, int8 [out, in]; a tie goes to the lower value."""
        rows, width = weight.shape
        codes = torch.empty(rows, width, dtype=torch.int8, device=weight.device)
        step = max(1, _CHUNK // max(width, 1))
        for a in range(0, rows, step):
            some = weight[a : a + step]
            nearest = self._nearest(self._units(some.float()), grid.rows(a, a + step))[0].view(len(some), -1)
            codes[a : a + step] = (nearest[:, :width] - (1 << (self.bits - 1))).to(torch.int8)
        return codes

    def decode(self, codes: Tensor, grid: BinaryGrid) -> Tensor:
        """The values of codes [out, in], float32."""
        rows, width = codes.shape
        first = (groups.index(width, self.group_size, codes.device) << self.bits) + (1 << (self.bits - 1))
        out = torch.empty(rows, width, device=codes.device)
        step = max(1, _CHUNK // max(width, 1))
        for a in range(0, rows, step):
            levels = grid.rows(a, a + step).levels().flatten(1)
            torch.gather(levels, 1, codes[a : a + step].long() + first, out=out[a : a + step])
        return out

    def stored(self, rows: int, width: int) -> Stored:
        """See docs/native-format.md, kind "binary"."""
        units = groups.count(width, self.group_size)
        return {
            "": (torch.uint8, (rows * row_bytes(width, self.bits),)),
            "_alpha": (self.scale_dtype, (rows, units, self.bits)),
            "_offset": (self.scale_dtype, (rows, units)),
        }

    def pack(self, codes: Tensor, grid: BinaryGrid) -> dict[str, Tensor]:
        """The tensors that `stored` describes."""
        return {
            "": pack_codes(codes, self.bits),
            "_alpha": grid.alpha.contiguous(),
            "_offset": grid.offset.contiguous(),
        }

    def unpack(
        self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int
    ) -> tuple[Tensor, BinaryGrid]:
        """Codes and grid of rows [start, stop) of a [rows, width] matrix; `get` returns a stored tensor by suffix."""
        packed = get("").view(rows, -1)[start:stop]
        return unpack_bits(packed, self.bits, width), BinaryGrid(get("_alpha"), get("_offset")).rows(start, stop)

    def plain(self) -> dict[str, Any]:
        """The entry of config.json."""
        dtype = dtype_name(self.scale_dtype)
        return {"kind": "binary", "bits": self.bits, "group_size": self.group_size, "scale_dtype": dtype}

    def _units(self, x: Tensor) -> Tensor:
        """[rows, in] as [rows, groups, size], zeros after a shorter last group."""
        rows, width = x.shape
        size = width if self.group_size < 0 else min(self.group_size, width)
        return pad(x, (0, -width % max(size, 1))).view(rows, -1, size)

    def _nearest(self, units: Tensor, grid: BinaryGrid) -> tuple[Tensor, Tensor]:
        """Unsigned codes int64 and their values, [rows, groups, size]."""
        levels, order = grid.levels().sort(dim=-1, stable=True)
        middle = (levels[..., 1:] + levels[..., :-1]) / 2
        place = torch.searchsorted(middle, units.contiguous())
        return order.gather(-1, place), levels.gather(-1, place)

    def _fit(self, units: Tensor, weigh: Tensor, start: Start, rounds: int) -> BinaryGrid:
        rows, groups, size = units.shape
        units, weigh = units.view(-1, 1, size), weigh.expand_as(units).reshape(-1, 1, size)
        starts = [self._greedy] if start == "greedy" or self.bits == 1 else [self._uniform]
        if start == "best" and self.bits > 1:
            starts.append(self._greedy)
        best = starts[0](units, weigh)
        codes, least = self._tried(units, weigh, best)
        for other in starts[1:]:
            self._take(
                best, codes, least, torch.arange(len(units), device=units.device), units, weigh, other(units, weigh)
            )
        active = torch.arange(len(units), device=units.device)
        for _ in range(rounds):  # groups that a round does not improve are done: the next would be the same
            some, h = units[active], weigh[active]
            active = self._take(best, codes, least, active, some, h, self._refit(some, h, codes[active]))
            if not len(active):
                break
        return BinaryGrid(best.alpha.view(rows, groups, self.bits), best.offset.view(rows, groups))

    def _take(
        self,
        best: BinaryGrid,
        codes: Tensor,
        least: Tensor,
        active: Tensor,
        units: Tensor,
        weigh: Tensor,
        grid: BinaryGrid,
    ) -> Tensor:
        """Write `grid` and its codes where they lower the error of the `active` groups; returns which those are."""
        trial_codes, error = self._tried(units, weigh, grid)
        better = (error < least[active]).squeeze(-1)
        where = active[better]
        best.alpha[where], best.offset[where] = grid.alpha[better], grid.offset[better]
        codes[where], least[where] = trial_codes[better], error[better]
        return where

    def _tried(self, units: Tensor, weigh: Tensor, grid: BinaryGrid) -> tuple[Tensor, Tensor]:
        codes, value = self._nearest(units, grid)
        return codes, ((value - units).square() * weigh).sum(-1)

    def _greedy(self, units: Tensor, weigh: Tensor) -> BinaryGrid:
        total = weigh.sum(-1, keepdim=True).clamp(min=1e-30)
        offset = (units * weigh).sum(-1, keepdim=True) / total
        rest, alphas = units - offset, []
        for _ in range(self.bits):
            alpha = (rest.abs() * weigh).sum(-1, keepdim=True) / total
            rest = rest - torch.where(rest < 0, -alpha, alpha)
            alphas.append(alpha)
        return self._as_stored(torch.cat(alphas, -1), offset.squeeze(-1))

    def _uniform(self, units: Tensor, weigh: Tensor) -> BinaryGrid:
        size = units.shape[-1]
        form = IntegerFormat(self.bits, False, -1, torch.float32)
        grid = form.fit(units.view(-1, size), search="mse", importance=weigh.view(-1, size))
        coding = of_integers(form, grid)
        return self._as_stored(coding.alpha, coding.offset)

    def _refit(self, units: Tensor, weigh: Tensor, codes: Tensor) -> BinaryGrid:
        """Least squares; where groups have fewer different codes than unknowns a faint ridge decides."""
        count = 1 << self.bits
        mass, pull = (
            torch.zeros(len(units), count, dtype=torch.float64, device=units.device).scatter_add_(1, codes[:, 0], x)
            for x in (weigh[:, 0].double(), (weigh * units)[:, 0].double())
        )
        numbers = torch.arange(count, device=units.device)
        bits = (numbers.unsqueeze(1) >> torch.arange(self.bits, device=units.device) & 1) * 2 - 1
        signs = torch.cat([bits, torch.ones_like(numbers).unsqueeze(1)], 1).double()
        normal, right = (signs.T * mass.unsqueeze(1)) @ signs, (pull @ signs).unsqueeze(-1)
        diagonal = normal.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(diagonal.sum(-1, keepdim=True).mul(1e-9).clamp(min=1e-30))
        solved = torch.linalg.solve_ex(normal, right)[0].transpose(-1, -2).float()
        return self._as_stored(solved[..., :-1], solved[..., -1])

    def _as_stored(self, alpha: Tensor, offset: Tensor) -> BinaryGrid:
        return BinaryGrid(alpha.to(self.scale_dtype), offset.to(self.scale_dtype))


def of_integers(form: IntegerFormat, grid: integer.IntegerGrid) -> BinaryGrid:
    """An integer grid with scales [out, groups] as binary coding of as many bits, in float32."""
    scale = grid.scale.float()
    zero = torch.zeros_like(scale) if grid.zero is None else grid.zero.float()
    powers = 2.0 ** torch.arange(-1, form.bits - 1, device=scale.device)
    # Codes are signed there: their middle is -1/2.
    return BinaryGrid(scale.unsqueeze(-1) * powers, scale * (-0.5 - zero))


def from_plain(plain: Mapping[str, Any]) -> BinaryFormat:
    """Undo `BinaryFormat.plain`."""
    return BinaryFormat(plain["bits"], plain["group_size"], dtype_of(plain["scale_dtype"]))


def from_target(target: Target) -> BinaryFormat:
    """The binary coding that a resolved target asks for. Raises PlanError without bits or with a grid per tensor."""
    if target.bits is None:
        raise PlanError("a quantizing step needs the number of bits: set target.bits to 2..8")
    return BinaryFormat(target.bits, integer.group_of(target), integer.scale_dtype_of(target))


FAMILY = Family(wanted={"binary": from_target}, written={"binary": from_plain})
