"""Hidden states between blocks, kept in a file: only the batch at hand occupies memory."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lilliput.errors import LilliputError

# What to do when the files of an unfinished run are not what it wrote.
START_ANEW = "delete the folder of the unfinished run, .NAME.partial beside the output NAME, and start again"


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of one or more dimensions, without a copy."""
    view: Any = tensor.view(torch.uint8).numpy()
    return memoryview(view).cast("B")


def fill(view: memoryview, file: int, at: int, path: Path) -> None:
    """Read all of `view` from an open file, from byte `at` on. Raises OSError where it is shorter."""
    count = 0
    while count < len(view):
        step = os.preadv(file, [view[count:]], at + count)
        if step == 0:
            raise OSError(f"{path} ended early")
        count += step


def store(view: memoryview, file: int, at: int) -> None:
    """Write all of `view` to an open file, from byte `at` on."""
    count = 0
    while count < len(view):
        count += os.pwrite(file, view[count:], at + count)


class Activations:
    """Hidden states [samples, tokens, hidden] of one dtype in one file, read and written by ranges of samples.

    Plain reads and writes rather than a memory map: mapped pages would count as memory of the process.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, *, create: bool) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._row = shape[1] * shape[2] * dtype.itemsize
        flags = os.O_RDWR | (os.O_CREAT | os.O_TRUNC if create else 0)
        try:
            self._file = os.open(path, flags, 0o666)
        except FileNotFoundError:
            if create:
                raise
            raise LilliputError(
                f"{path} is missing: the unfinished run cannot continue without it; {START_ANEW}"
            ) from None
        size = shape[0] * self._row
        if create:
            # Reserving the space now turns a full disk into an error before the work, not in the middle of it.
            try:
                os.posix_fallocate(self._file, 0, max(size, 1))
            except OSError as error:
                os.close(self._file)
                path.unlink(missing_ok=True)
                raise OSError(error.errno, error.strerror, str(path)) from None
        elif os.fstat(self._file).st_size < size:
            os.close(self._file)
            raise LilliputError(f"{path} is shorter than its {size} bytes (a power failure?); {START_ANEW}")

    @classmethod
    def taken_up(cls, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, checksum: int) -> Self:
        """What an interrupted run has left. Raises LilliputError unless it is whole and has the recorded checksum."""
        states = cls(path, shape, dtype, create=False)
        if states.checksum() != checksum:
            states.close()
            raise LilliputError(f"{path} is not what the unfinished run wrote (a power failure?); {START_ANEW}")
        return states

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        """Samples [start, stop) as a new tensor [stop - start, tokens, hidden]."""
        out = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        fill(raw(out), self._file, start * self._row, self.path)
        return out

    def write(self, start: int, hidden: Tensor) -> None:
        """Store `hidden` [n, tokens, hidden] from sample `start` on."""
        store(raw(hidden.detach().to("cpu", self.dtype).contiguous()), self._file, start * self._row)

    def checksum(self) -> int:
        """CRC-32 of the content: a resumed run starts from it only if it is what was written."""
        value = 0
        for start in range(self.shape[0]):
            value = zlib.crc32(raw(self.read(start, start + 1)), value)
        return value

    def close(self) -> None:
        """Close the file and keep it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def delete(self) -> None:
        """Close and remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
