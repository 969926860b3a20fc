"""Tensors in one file, of which only those at hand are in memory, with copies of the file to go back to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lilliput.streaming.states import fill, raw, store


class Pages:
    """Tensors by name, of the shapes and dtypes of `likes` (whose values are not looked at), 0 at first, in the file
    `folder`/`name`.bin. Raises OSError, also for a full disk."""

    def __init__(self, likes: Mapping[str, Tensor], folder: Path, name: str) -> None:
        self.path = folder / f"{name}.bin"
        self._shapes = {key: (x.shape, x.dtype) for key, x in likes.items()}
        self._at: dict[str, int] = {}
        self.bytes = 0
        for key, x in likes.items():
            self._at[key] = self.bytes
            self.bytes += x.numel() * x.dtype.itemsize
        self._file = -1
        self._open(fresh=True)

    def _open(self, *, fresh: bool) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o666)
        try:
            # Reserving the space now turns a full disk into an error before the work, not in the middle of it.
            os.posix_fallocate(self._file, 0, max(self.bytes, 1))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def read(self, name: str) -> Tensor:
        """A new tensor on the CPU."""
        shape, dtype = self._shapes[name]
        out = torch.empty(shape, dtype=dtype)
        if out.numel():
            fill(raw(out.reshape(-1)), self._file, self._at[name], self.path)
        return out

    def write(self, name: str, value: Tensor) -> None:
        """A tensor of the shape under that name, on any device."""
        shape, dtype = self._shapes[name]
        if value.shape != shape:
            raise RuntimeError(f"{name} has the shape {list(value.shape)}, and its place that of {list(shape)}")
        if value.numel():
            store(raw(value.detach().to("cpu", dtype).contiguous().reshape(-1)), self._file, self._at[name])

    def _copy(self, tag: str) -> Path:
        return self.path.with_name(f"{self.path.stem}-{tag}.bin")

    def copy(self, tag: str) -> None:
        """A durable copy under `tag`, in place of an earlier one, whole or not at all."""
        path = self._copy(tag)
        fresh = path.with_suffix(".new")
        try:
            shutil.copyfile(self.path, fresh)
            with fresh.open("rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from None
        fresh.replace(path)

    def go_back(self, tag: str) -> None:
        """The content becomes that of a copy."""
        shutil.copyfile(self._copy(tag), self.path)
        self._open(fresh=False)

    def forget(self, *but: str) -> None:
        """Remove the copies of other tags."""
        kept = {self._copy(tag) for tag in but}
        for path in self._copies():
            if path not in kept:
                path.unlink()

    def _copies(self) -> list[Path]:
        return [x for end in ("bin", "new") for x in self.path.parent.glob(f"{self.path.stem}-*.{end}")]

    def delete(self) -> None:
        """Remove the file and its copies."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        for path in (self.path, *self._copies()):
            path.unlink(missing_ok=True)
