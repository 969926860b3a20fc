"""Formats that a column-by-column sweep can round to: scales are fixed before it, a value goes to its nearest level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.algebra.obs import Rounding
from lilliput.errors import PlanError
from lilliput.formats import affine, levels
from lilliput.formats.affine import AffineFormat
from lilliput.formats.format import Format
from lilliput.formats.integer import Grid, IntegerFormat
from lilliput.formats.levels import LevelFormat
from lilliput.formats.nested import NestedFormat
from lilliput.formats.scales import FloatScales, Scales

Sweepable = IntegerFormat | AffineFormat | NestedFormat | LevelFormat
_COLUMNS = 16  # looked up at a time; a weight takes up to 50 bytes meanwhile
NAMES = ("int", "affine", *levels.PRESETS)  # of a target's format


@dataclass(frozen=True)
class Swept:
    """A fitted format as a sweep sees it.

    `grid`: scales [out, groups] ([1, 1]: per tensor) and zero points, int8, real or None, a copy that the sweep may
    write to where `moves` names the type that a scale is rounded to by itself (None: scales are fixed).
    """

    form: Sweepable
    grid: Grid
    moves: torch.dtype | None

    def rows(self, start: int, stop: int) -> Swept:
        """Output rows [start, stop): views, so that what changes there changes here."""
        return Swept(self.form, self.grid.rows(start, stop), self.moves)

    def rounding(self, rows: int, group: Sequence[int]) -> Rounding:
        """The grid for `rows` outputs, `group` being that of each column in sweep order."""
        if isinstance(self.form, LevelFormat):
            return Rounding.levels(self.grid.scale, self.form.on(self.grid.scale).snap, rows, group)
        return Rounding.of(self.grid.scale, self.grid.zero, self.form.bits, rows, group)

    def codes(self, centred: Tensor, group: Sequence[int]) -> Tensor:
        """Centred codes [in, out] of a sweep, overwritten, to codes int8 [out, in]; `group`: of each column."""
        if isinstance(self.form, LevelFormat):
            table, half = self.form.on(centred), 1 << (self.form.bits - 1)
            codes = torch.empty(centred.shape, dtype=torch.int8, device=centred.device)
            for a in range(0, len(centred), _COLUMNS):
                codes[a : a + _COLUMNS] = (table.index(centred[a : a + _COLUMNS]) - half).to(torch.int8)
            return codes.T
        zero = self.grid.zero
        if zero is not None:
            columns = torch.tensor(group, device=centred.device)
            centred += zero.float().expand(centred.shape[1], -1).T[columns]
            if zero.is_floating_point():
                centred.round_()  # whole numbers but for the last bits
        return centred.T.to(torch.int8)


def check(form: Format) -> Sweepable:
    """The format itself. Raises PlanError where a sweep cannot round to it."""
    if not isinstance(form, Sweepable):
        raise PlanError(f"{form.describe()} cannot be swept column by column: choose {', '.join(NAMES)}")
    return form


def start(form: Sweepable, grid: Any) -> Swept:
    """`grid` is what the format's `fit` returned; it is left as it is."""
    if isinstance(form, IntegerFormat):
        zero = None if grid.zero is None else grid.zero.clone()
        return Swept(form, Grid(grid.scale.clone(), zero), form.scale_dtype if form.group_size != 0 else None)
    if isinstance(form, AffineFormat):
        return Swept(form, Grid(grid.scale.clone(), grid.zero), form.scale_dtype)
    if isinstance(form, NestedFormat):
        return Swept(form, form.grid(grid), None)
    kind = form.scales
    moves = kind.dtype if isinstance(kind, FloatScales) and form.group_size != 0 else None
    return Swept(form, Grid(grid.values() if moves is None else grid.codes.clone()), moves)


def finish(swept: Swept, grid: Any) -> Any:
    """The format's own grid after the sweep; `grid` is the one that `start` was given."""
    if isinstance(swept.form, IntegerFormat):
        return swept.grid
    if isinstance(swept.form, AffineFormat):
        return affine.Grid(swept.grid.scale, grid.zero)
    if swept.moves is None:
        return grid
    return Scales(grid.kind, swept.grid.scale)
