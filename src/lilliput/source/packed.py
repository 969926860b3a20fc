"""Weights that a file holds as codes, and their values.

All of them obey value = (code - zero) * scale, computed in float32 from the stored scale, then cast to the dtype that
the checkpoint declares; what differs is how codes lie in the file and how many weights share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from lilliput.formats.bits import unpack_words
from lilliput.source.reader import Reader

CHUNK = 1 << 20  # weights decoded at a time: temporaries are several int32 a weight
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Packed(Protocol):
    """One weight: `shape` and `dtype` as decoded, `parts` the stored tensors that it takes."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def parts(self) -> tuple[str, ...]: ...

    def decode(self, reader: Reader, rows: tuple[int, int] | None = None) -> Tensor:
        """The weight, or its rows [start, stop) along the first axis."""
        ...


@dataclass(frozen=True)
class Cast:
    """A tensor that is stored as its values, in a dtype that no model runs in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.stored,)

    def decode(self, reader: Reader, rows: tuple[int, int] | None = None) -> Tensor:
        """The values in `dtype`, or those of rows [start, stop)."""
        return reader.read(self.stored, rows).to(self.dtype)


def floats(reader: Reader, dtype: torch.dtype) -> dict[str, Packed]:
    """The 8-bit floats of a checkpoint that tells of no scales, to be read as `dtype`, as transformers does."""
    return {name: Cast(x.shape, dtype, name) for name, x in reader.entries.items() if x.dtype in FP8}


@dataclass(frozen=True)
class Scaled:
    """Codes [.., out, in] with a scale for every `block` = (rows, columns) of them.

    `bits`: codes are packed densely into int32 words along the inputs, as compressed-tensors does; None: not packed.
    `zero`: stored zero points; `zero_packed`: packed along the rows at `bits` each. `order`: stored int32 [in], the
    scale column of every input (activation order); without it inputs share by position, and the last group may be
    shorter.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: str
    scale: str
    block: tuple[int, int]
    bits: int | None = None
    zero: str | None = None
    zero_packed: bool = False
    order: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(x for x in (self.codes, self.scale, self.zero, self.order) if x is not None)

    def decode(self, reader: Reader, rows: tuple[int, int] | None = None) -> Tensor:
        """The weight [.., out, in] in `dtype`, or its rows [start, stop) along the first axis."""
        first, last = rows or (0, self.shape[0])
        if len(self.shape) == 3:
            codes, scales = reader.read(self.codes, (first, last)), reader.read(self.scale).float()
            scales = scales.reshape(self.shape[0], *(scales.shape[1:] if scales.dim() == 3 else (1, 1)))[first:last]
            return torch.stack([self._values(c, s, None, 0, None) for c, s in zip(codes, scales, strict=True)])
        out_features, in_features = self.shape
        scale = _matrix(reader.read(self.scale).float())
        zero = None
        if self.zero is not None:
            zero = reader.read(self.zero)
            if self.zero_packed and self.bits is not None:
                zero = unpack_words(zero.T, self.bits, out_features).T
            zero = _matrix(zero.float())
        order = None if self.order is None else reader.read(self.order).long()
        out = torch.empty(last - first, in_features, dtype=self.dtype)
        step = max(1, CHUNK // max(1, in_features))
        for start in range(first, last, step):
            stop = min(last, start + step)
            codes = reader.read(self.codes, (start, stop))
            if self.bits is not None:
                codes = unpack_words(codes, self.bits, in_features)
            out[start - first : stop - first] = self._values(codes, scale, zero, start, order)
        return out

    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor | None, start: int, order: Tensor | None) -> Tensor:
        rows = torch.arange(start, start + codes.shape[0]) // self.block[0]
        columns = torch.arange(codes.shape[1]) // self.block[1] if order is None else order
        values = codes.float()
        if zero is not None:
            values -= zero[rows][:, columns]
        return values.mul_(scale[rows][:, columns]).to(self.dtype)


def _matrix(scale: Tensor) -> Tensor:
    """Scales as [rows, columns]: a scalar or [1] is [1, 1], [out] is one a row."""
    return scale.reshape(-1, 1) if scale.dim() < 2 else scale


def block_of(
    shape: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Rows and columns of a weight that share one entry of `scale`; None when the shapes do not fit.

    Without `block` the sizes must divide; a scalar is one scale for the matrix, a vector one for each row.
    """
    matrix = shape[-2:]
    grid = (1, 1) if prod(scale) == 1 or (len(shape) == 3 and len(scale) == 1) else scale[-2:]
    if len(grid) == 1:
        grid = (grid[0], 1)
    if block is None:
        block = (-(-matrix[0] // max(1, grid[0])), -(-matrix[1] // max(1, grid[1])))
    elif grid == (1, 1):
        block = (matrix[0], matrix[1])
    fits = all(g == -(-m // b) for g, m, b in zip(grid, matrix, block, strict=True))
    return block if fits else None
