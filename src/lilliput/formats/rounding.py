"""Rounding that gradients pass straight through, on integer grids whose scale and zero point are learned too.

A weight is written in code units: position u, centred code c = clip(round(u), lowest - Z, highest - Z), value S c, with
one scale S and zero point Z for each unit of weights (a row's group, a row, or the matrix). Straight-through gradients
(Bengio et al. 2013, arXiv 1308.3432): round counts as the identity, so that with g = dL/dvalue

    dL/du = g S inside the window of codes, 0 outside;  dL/dS = sum g c;  dL/dZ = -sum g S outside the window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lilliput.algebra import ranges as search
from lilliput.formats.integer import IntegerFormat, IntegerGrid

_CHUNK = 1 << 20  # weights at a time: the temporaries stay small


@dataclass(frozen=True)
class Units:
    """How the weights [rows, width] of a matrix share the numbers [units] of an integer format's grid."""

    form: IntegerFormat
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
        for rows in units.pieces():
            low = units.spread(units.form.lowest - units.of(zero, rows))
            high = low + (units.form.highest - units.form.lowest)
            free = position[rows].round()
            code = torch.minimum(torch.maximum(free, low), high)
            torch.eq(code, free, out=inside[rows])
            codes[rows] = code.to(torch.int16)
            torch.mul(code, units.spread(units.of(scale, rows)), out=value[rows])
        ctx.save_for_backward(codes, inside, scale)
        ctx.units = units
        return value

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (slope,) = slopes
        codes, inside, scale = ctx.saved_tensors
        units: Units = ctx.units
        by_position = torch.empty_like(slope)
        by_scale, by_zero = torch.zeros_like(scale), torch.zeros_like(scale)
        for rows in units.pieces():
            g = slope[rows]
            steps = units.gather(g * codes[rows])
            g = g * units.spread(units.of(scale, rows))
            passed = torch.mul(g, inside[rows], out=by_position[rows])
            zero_slope = units.gather(passed - g)
            if scale.shape[0] == 1:
                by_scale += steps.sum(0, keepdim=True)
                by_zero += zero_slope.sum(0, keepdim=True)
            else:
                by_scale[rows], by_zero[rows] = steps, zero_slope
        return by_position, by_scale, by_zero, None


def rounded(position: Tensor, scale: Tensor, zero: Tensor, units: Units) -> Tensor:
    """S clip(round(u), ...) [rows, width] for positions u, scale and zero [units], float32; gradients to all three."""
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
    """`shown` in place of `given`, whose gradient it hands on."""
    out: Tensor = _Through.apply(source, value)  # type: ignore[no-untyped-call]
    return out


def stored_scale(scale: Tensor, form: IntegerFormat) -> Tensor:
    """A scale as the file will hold it, float32; gradients pass."""
    return through(scale, search.stored(scale.detach(), form.scale_dtype))


def encode(position: Tensor, scale: Tensor, zero: Tensor, units: Units) -> tuple[Tensor, IntegerGrid]:
    """Codes int8 [rows, width] and grid of what `rounded` gives for scales that are as stored."""
    codes = torch.empty(position.shape, dtype=torch.int8, device=position.device)
    form = units.form
    for rows in units.pieces():
        offset = units.spread(units.of(zero, rows))
        codes[rows] = position[rows].round().add_(offset).clamp_(form.lowest, form.highest).to(torch.int8)
    return codes, IntegerGrid(scale.to(form.scale_dtype), None if form.symmetric else zero.to(torch.int8))
