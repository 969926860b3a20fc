"""Formats that a column-by-column sweep can round to: scales are fixed before it, a value goes to its nearest level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lilliput.algebra.obs import Rounding
from lilliput.errors import PlanError
from lilliput.formats.format import Format
from lilliput.formats.integer import IntegerGrid
from lilliput.formats.known import FAMILIES

NAMES = tuple(name for family in FAMILIES if family.swept for name in family.wanted)  # of a target's format


@runtime_checkable
class Sweepable(Format, Protocol):
    """A format as a sweep needs it. Within the sweep its grid is an `IntegerGrid`: scales [out, groups] ([1, 1]: per
    tensor) and zero points, int8, real or None."""

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    def sweep_grid(self, grid: Any) -> tuple[IntegerGrid, torch.dtype | None]:
        """What the format's `fit` returned, which is left as it is, as the sweep sees it; and the type that a scale is
        rounded to by itself, where the sweep may move scales: they are a copy then."""
        ...

    def swept_grid(self, swept: IntegerGrid, grid: Any) -> Any:
        """The format's own grid after the sweep; `grid` is the one that `sweep_grid` was given."""
        ...

    def sweep_rounding(self, swept: IntegerGrid, rows: int, group: Sequence[int]) -> Rounding:
        """The levels for `rows` outputs, `group` being that of each column in sweep order."""
        ...

    def swept_codes(self, centred: Tensor, swept: IntegerGrid, group: Sequence[int]) -> Tensor:
        """Centred codes [in, out] of a sweep, overwritten, to codes int8 [out, in]; `group`: of each column."""
        ...


@dataclass(frozen=True)
class Swept:
    """A fitted format under a sweep; see `Sweepable.sweep_grid` for `grid` and `moves` (None: scales are fixed)."""

    form: Sweepable
    grid: IntegerGrid
    moves: torch.dtype | None

    def rows(self, start: int, stop: int) -> Swept:
        """Output rows [start, stop): views, so that what changes there changes here."""
        return Swept(self.form, self.grid.rows(start, stop), self.moves)

    def rounding(self, rows: int, group: Sequence[int]) -> Rounding:
        """The grid for `rows` outputs, `group` being that of each column in sweep order."""
        return self.form.sweep_rounding(self.grid, rows, group)

    def codes(self, centred: Tensor, group: Sequence[int]) -> Tensor:
        """Centred codes [in, out] of a sweep, overwritten, to codes int8 [out, in]; `group`: of each column."""
        return self.form.swept_codes(centred, self.grid, group)


def check(form: Format) -> Sweepable:
    """The format itself. Raises PlanError where a sweep cannot round to it."""
    if not isinstance(form, Sweepable):
        raise PlanError(f"{form.describe()} cannot be swept column by column: choose {', '.join(NAMES)}")
    return form


def start(form: Sweepable, grid: Any) -> Swept:
    """`grid` is what the format's `fit` returned; it is left as it is."""
    return Swept(form, *form.sweep_grid(grid))


def finish(swept: Swept, grid: Any) -> Any:
    """The format's own grid after the sweep; `grid` is the one that `start` was given."""
    return swept.form.swept_grid(swept.grid, grid)
