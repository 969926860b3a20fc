"""What a numeric grid is to the rest: something that fits, encodes, decodes, and says exactly what it stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from lilliput.errors import SourceError

Stored = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # suffix of a stored tensor's name to its dtype and shape
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
CHUNK = 1 << 19  # codes widened at a time; a code passes through a 64-bit word


class Grid(Protocol):
    """The fitted parameters of a format for one matrix: scales, zero points, tables."""

    def rows(self, start: int, stop: int) -> Self:
        """The parameters of output rows [start, stop)."""
        ...


class Format(Protocol):
    """A numeric grid with its block shape and scale kind; frozen, known before any weight is read.

    Codes are an integer tensor whose first dimension is the output rows, so that rows can be cut; what a code means is
    the format's business. `grid` is what the format's own `fit` returned.
    """

    def describe(self) -> str:
        """For tables: "int4 g64 asym"."""
        ...

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size of a [rows, width] matrix: codes and all parameters, without padding to bytes."""
        ...

    def fit(self, weight: Tensor, *, importance: Tensor | None = None) -> Grid:
        """Parameters for `weight` [out, in]; `importance` [in] or [out, in] weighs squared errors."""
        ...

    def encode(self, weight: Tensor, grid: Any) -> Tensor:
        """The nearest codes."""
        ...

    def decode(self, codes: Tensor, grid: Any) -> Tensor:
        """The values of codes, float32 [out, in]."""
        ...

    def stored(self, rows: int, width: int) -> Stored:
        """What a file holds of a [rows, width] matrix: "" is the payload, one-dimensional, others append to it."""
        ...

    def pack(self, codes: Tensor, grid: Any) -> dict[str, Tensor]:
        """The tensors that `stored` describes."""
        ...

    def unpack(self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int) -> tuple[Tensor, Any]:
        """Codes and grid of rows [start, stop) of a [rows, width] matrix; `get` returns a stored tensor by suffix."""
        ...

    def plain(self) -> dict[str, Any]:
        """The entry of config.json, with the format's `kind`; `formats.known.from_plain` reads it back."""
        ...


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Undo `dtype_name`, for floats that scales and values are stored in. Raises SourceError for another name."""
    if name not in DTYPES:
        raise SourceError(f"values of type {name!r} are newer than this lilliput: install the one that wrote them")
    return DTYPES[name]
