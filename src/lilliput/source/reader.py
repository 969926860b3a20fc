"""What every kind of file offers: tensors by name, whole or by rows, never more than asked for in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lilliput.errors import SourceError

CHUNK = 16 << 20  # bytes that a scan holds at a time


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: shape and dtype as `Reader.read` returns it, and the bytes it takes in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    file: Path


class Reader(Protocol):
    """Tensors of one checkpoint. No file stays mapped: mapped pages would count as memory of the process."""

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor, or its rows [start, stop) along the first axis; contiguous, on the CPU."""
        ...

    def chunks(self, name: str) -> Iterator[tuple[NDArray[np.uint8], Tensor]]:
        """(stored bytes as uint8, the same as a tensor), about `CHUNK` bytes at a time, in order."""
        ...


def pread(path: Path, offset: int, buffer: NDArray[np.uint8]) -> None:
    """Fill `buffer` (uint8) from `offset` of the file. Raises SourceError when the file ends before."""
    handle = os.open(path, os.O_RDONLY)
    try:
        count, view = 0, memoryview(buffer.data)
        while count < len(view):
            step = os.preadv(handle, [view[count : count + (1 << 30)]], offset + count)
            if step == 0:
                raise SourceError(
                    f"{path} ends {len(view) - count} bytes early: it was cut while it was read. Copy or download "
                    "it again."
                )
            count += step
    finally:
        os.close(handle)


def row_chunks(shape: tuple[int, ...], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `CHUNK` bytes each."""
    step = max(1, CHUNK // max(1, row_bytes))
    for start in range(0, shape[0], step):
        yield start, min(shape[0], start + step)
