"""Formats that round whole columns at a time, as a sweep through the inputs shows them: vectors and walks."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lilliput.algebra import ldlq
from lilliput.formats.format import Format


@runtime_checkable
class Walked(Format, Protocol):
    """A format whose grid is a dataclass with a field `scale`, [out, 1] or [1, 1] in `scale_dtype`."""

    @property
    def scale_dtype(self) -> torch.dtype: ...

    def fit(self, weight: Tensor, *, importance: Tensor | None = None) -> Any:
        """The grid, as `Format.fit` gives it."""
        ...

    def settle(self, grid: Any, rows: int) -> ldlq.Settle:
        """How a sweep rounds columns of `rows` weights."""
        ...
