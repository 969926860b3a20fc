"""Rounding that gradients pass straight through, on grids whose scale and zero point are learned too.

A weight is written in code units: position u, centred code c = clip(round(u + Z), lowest, highest) - Z, value S c, with
one scale S and zero point Z, whole or not, for each unit of weights (a row's group, a row, or the matrix). Where codes
are indices of uneven levels, Z is 0 and the value S level(c). Straight-through gradients (Bengio et al. 2013, arXiv
1308.3432): round counts as the identity, and levels as evenly spaced, so that with g = dL/dvalue

    dL/du = g S inside the window of codes, 0 outside;  dL/dS = sum g c;  dL/dZ = -sum g S outside the window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lilliput.formats.format import Format

_CHUNK = 1 << 20  # weights at a time: the temporaries stay small


class Trainable(Format, Protocol):
    """A format whose scales and zero points can be trained, float32 [rows, groups]."""

    @property
    def lowest(self) -> int: ...

    @property
    def highest(self) -> int: ...

    @property
    def symmetric(self) -> bool:
        """Whether zero points are 0."""
        ...

    @property
    def group_size(self) -> int:
        """As `IntegerFormat.group_size`."""
        ...

    def groups(self, width: int) -> int: ...

    def group_of(self, width: int, device: torch.device | str = "cpu") -> Tensor: ...

    def levels(self, device: torch.device | str) -> Tensor | None:
        """What the codes from `lowest` on stand for, float32; None where they are whole numbers."""
        ...

    def opened(self, grid: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point of what `fit` returned."""
        ...

    def nearest(self, scale: Tensor, zero: Tensor, grid: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point as a file will hold them, near to these; `grid`: the one that they started from."""
        ...

    def closed(self, scale: Tensor, zero: Tensor, grid: Any) -> Any:
        """The grid of scale and zero point that `nearest` gave; `grid` as there."""
        ...


@dataclass(frozen=True)
class Units:
    """How the weights [rows, width] of a matrix share the numbers [units] of a format's grid."""

    form: Trainable
    rows: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of a grid's scale."""
        return (1, 1) if self.form.group_size == 0 else (self.rows, self.form.groups(self.width))

    def spread(self, numbers: Tensor) -> Tensor:
        """numbers [rows or 1, groups] for each weight, [rows or 1, width]."""
        if numbers.shape[1] == 1:
            return numbers.expand(-1, self.width)
        if self.width % self.form.group_size == 0:
            return numbers.repeat_interleave(self.form.group_size, 1)
        return numbers[:, self.form.group_of(self.width, numbers.device)]

    def gather(self, values: Tensor) -> Tensor:
        """The sums [rows, groups] of values [rows, width] over each row's groups."""
        size = self.form.group_size
        if size <= 0 or size >= self.width:
            return values.sum(1, keepdim=True)
        if self.width % size == 0:
            return values.view(values.shape[0], -1, size).sum(2)
        out = values.new_zeros(values.shape[0], self.form.groups(self.width))
        return out.index_add_(1, self.form.group_of(self.width, values.device), values)

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest of values [rows, width] in each unit, 0 among them; differentiable."""
        size = self.form.group_size
        if size == 0:
            low, high = (x.view(1, 1) for x in (values.min(), values.max()))
        elif size < 0 or size >= self.width:
            low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        elif self.width % size == 0:
            grouped = values.view(values.shape[0], -1, size)
            low, high = grouped.amin(2), grouped.amax(2)
        else:
            index = self.form.group_of(self.width, values.device).expand_as(values)
            out = values.new_zeros(values.shape[0], self.form.groups(self.width))
            low, high = (out.scatter_reduce(1, index, values, how) for how in ("amin", "amax"))
        return low.clamp(max=0), high.clamp(min=0)

    def pieces(self, weights: int = _CHUNK) -> Iterator[slice]:
        """Rows few at a time, about so many weights."""
        step = max(1, weights // max(self.width, 1))
        for a in range(0, self.rows, step):
            yield slice(a, min(a + step, self.rows))

    def pieces_with_units(self, weights: int) -> Iterator[tuple[slice, Units]]:
        """Such pieces with the units of their own; a grid per tensor stays whole."""
        if self.form.group_size == 0:
            yield slice(0, self.rows), self
            return
        for rows in self.pieces(weights):
            yield rows, replace(self, rows=rows.stop - rows.start)

    def of(self, numbers: Tensor, rows: slice) -> Tensor:
        """The grid numbers of some rows; one per tensor serves all."""
        return numbers if numbers.shape[0] == 1 else numbers[rows]


class _Rounded(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, scale: Tensor, zero: Tensor, units: Units) -> Tensor:
        value = torch.empty_like(position)
        codes = torch.empty_like(position, dtype=torch.int16)
        inside = torch.empty_like(position, dtype=torch.bool)
        whole, part = parted(zero)
        for rows in units.pieces():
            low = units.spread(units.form.lowest - units.of(whole, rows))
            high = low + (units.form.highest - units.form.lowest)
            free = _shifted(position[rows], part, rows, units, 1.0).round()
            code = torch.minimum(torch.maximum(free, low), high)
            torch.eq(code, free, out=inside[rows])
            codes[rows] = code.to(torch.int16)
            meant = _meant(codes[rows], part, rows, units)
            torch.mul(meant, units.spread(units.of(scale, rows)), out=value[rows])
        ctx.save_for_backward(codes, inside, scale, part)
        ctx.units = units
        return value

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (slope,) = slopes
        codes, inside, scale, part = ctx.saved_tensors
        units: Units = ctx.units
        by_position = torch.empty_like(slope)
        by_scale, by_zero = torch.zeros_like(scale), torch.zeros_like(scale)
        for rows in units.pieces():
            g = slope[rows]
            steps = units.gather(g * _meant(codes[rows], part, rows, units))
            g = g * units.spread(units.of(scale, rows))
            passed = torch.mul(g, inside[rows], out=by_position[rows])
            zero_slope = units.gather(passed - g)
            if scale.shape[0] == 1:
                by_scale += steps.sum(0, keepdim=True)
                by_zero += zero_slope.sum(0, keepdim=True)
            else:
                by_scale[rows], by_zero[rows] = steps, zero_slope
        return by_position, by_scale, by_zero, None


def parted(zero: Tensor) -> tuple[Tensor, Tensor | None]:
    """Zero points as whole numbers and what is left, at most a half; None where nothing is."""
    whole = zero.round()
    return whole, None if torch.equal(whole, zero) else zero - whole


def _shifted(position: Tensor, part: Tensor | None, rows: slice, units: Units, sign: float) -> Tensor:
    return position if part is None else position + sign * units.spread(units.of(part, rows))


def _meant(codes: Tensor, part: Tensor | None, rows: slice, units: Units) -> Tensor:
    """Value by scale, float32 or whole, of codes int16 from which whole zero points are taken."""
    levels = units.form.levels(codes.device)
    if levels is not None:
        return levels[codes.long() - units.form.lowest]
    return codes if part is None else _shifted(codes.float(), part, rows, units, -1.0)


def rounded(position: Tensor, scale: Tensor, zero: Tensor, units: Units) -> Tensor:
    """S c [rows, width] for positions u, scale and zero [units], float32; gradients to all three."""
    out: Tensor = _Rounded.apply(position, scale, zero, units)  # type: ignore[no-untyped-call]
    return out


class _Through(torch.autograd.Function):
    """Another value, the same gradient."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0], None


def through(source: Tensor, value: Tensor) -> Tensor:
    """`value` in place of `source`, to which gradients go as if it were that."""
    out: Tensor = _Through.apply(source, value)  # type: ignore[no-untyped-call]
    return out


def stored(scale: Tensor, zero: Tensor, units: Units, grid: Any) -> tuple[Tensor, Tensor]:
    """Scale and zero point as the file will hold them, float32; gradients pass. `grid`: where they started."""
    near = units.form.nearest(scale.detach(), zero.detach(), grid)
    return through(scale, near[0]), through(zero, near[1])


def encode(position: Tensor, scale: Tensor, zero: Tensor, units: Units, grid: Any) -> tuple[Tensor, Any]:
    """Codes int8 [rows, width] and grid of what `rounded` gives for scales that are as stored; `grid`: where they
    started."""
    codes = torch.empty(position.shape, dtype=torch.int8, device=position.device)
    form = units.form
    whole, part = parted(zero)
    for rows in units.pieces():
        free = _shifted(position[rows], part, rows, units, 1.0).round()
        codes[rows] = free.add_(units.spread(units.of(whole, rows))).clamp_(form.lowest, form.highest).to(torch.int8)
    return codes, form.closed(scale, zero, grid)
