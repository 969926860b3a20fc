"""The weight files of a run: each has its full size from the beginning, and every tensor its place in it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lilliput.errors import LilliputError, SourceError
from lilliput.export.folder import safetensors_bytes, safetensors_header
from lilliput.machine import memory
from lilliput.plan.tensors import METADATA
from lilliput.source.shards import header_of
from lilliput.streaming.states import START_ANEW, raw

PART = ".part"  # ends the names of unfinished files, so that nothing takes them for a model's
CHUNK = 16 * memory.MB  # bytes that are read at a time

Contents = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Output:
    """The weight files of `folder`. `files`: what each holds, by name: dtype and shape of its tensors, by name.

    A file that is laid out has the header that the safetensors library would write from all of its tensors, and its
    space on the disk; tensors are then written in any order, each to its place. Where that is, the library itself has
    read from the header. What has been written is never touched again. Errors of the disk, a full one among them, are
    OSErrors that name the file.
    """

    def __init__(self, folder: Path, files: Mapping[str, Contents]) -> None:
        self._folder = folder
        self._files = files
        self._file = {tensor: name for name, contents in files.items() for tensor in contents}
        self._offsets: dict[str, int] = {}

    def lay_out(self) -> None:
        """Make all files anew, empty but for their headers, whatever an earlier run has left of them."""
        for stale in self._folder.glob(f"*{PART}"):
            stale.unlink()
        for name, contents in self._files.items():
            path = self._folder / (name + PART)
            with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as handle, _named(path):
                # Reserving the space now turns a full disk into an error before the work, not in the middle of it.
                os.posix_fallocate(handle, 0, safetensors_bytes(contents, METADATA))
                _write_at(handle, memoryview(safetensors_header(contents, METADATA)[0]), 0)
                os.fsync(handle)
            self._locate(path, contents)
        _sync(self._folder)

    def take_up(self, hashes: Mapping[str, str]) -> None:
        """Go on with the files of an unfinished run, whose finished tensors have these sha256 (hex).

        Raises LilliputError where a file is gone, or is not what that run has written.
        """
        for name, contents in self._files.items():
            path = self._path(name)
            if not path.is_file():
                raise LilliputError(f"{path} was written by the unfinished run and is missing; {START_ANEW}")
            header = safetensors_header(contents, METADATA)[0]
            with path.open("rb") as file:
                same = file.read(len(header)) == header and path.stat().st_size == safetensors_bytes(contents, METADATA)
            if not same:
                raise _changed(path)
            self._locate(path, contents)
            for tensor in contents:
                if tensor in hashes and self._digest(path, tensor, contents) != hashes[tensor]:
                    raise _changed(path, tensor)

    def write(self, names: Iterable[str], pieces: Callable[[str], Iterable[Tensor]]) -> dict[str, str]:
        """Write tensors to their places, durably. Returns their sha256 (hex).

        pieces: a tensor, by name, as consecutive rows, or whole as one piece. Raises RuntimeError for a tensor that is
        not as planned.
        """
        hashes = {}
        with ExitStack() as stack:
            handles: dict[Path, int] = {}
            for name in names:
                path = self._path(self._file[name])
                if path not in handles:
                    handles[path] = stack.enter_context(_opened(path, os.O_WRONLY))
                hashes[name] = self._write(handles[path], path, name, pieces(name))
            for path, handle in handles.items():
                with _named(path):
                    os.fsync(handle)
        return hashes

    def write_rows(self, names: Iterable[str], slabs: Iterable[Mapping[str, Tensor]]) -> dict[str, str]:
        """Write several tensors together, durably, from slabs that have the next rows of each by name. Returns their
        sha256 (hex). Raises RuntimeError for a tensor that is not as planned."""
        with ExitStack() as stack:
            handles: dict[Path, int] = {}
            places = {}
            for name in names:
                path = self._path(self._file[name])
                if path not in handles:
                    handles[path] = stack.enter_context(_opened(path, os.O_WRONLY))
                places[name] = _Place(handles[path], path, name, *self._files[self._file[name]][name])
            for slab in slabs:
                for name, piece in slab.items():
                    places[name].write(piece, self._offsets[name])
            for path, handle in handles.items():
                with _named(path):
                    os.fsync(handle)
        return {name: place.whole() for name, place in places.items()}

    def finish(self) -> None:
        """All tensors are written: the files get their names."""
        for name in self._files:
            path = self._path(name)
            if path.name != name:
                path.rename(self._folder / name)
        _sync(self._folder)

    def _write(self, handle: int, path: Path, name: str, pieces: Iterable[Tensor]) -> str:
        place = _Place(handle, path, name, *self._files[self._file[name]][name])
        for piece in pieces:
            place.write(piece, self._offsets[name])
        return place.whole()

    def _path(self, name: str) -> Path:
        part = self._folder / (name + PART)
        return self._folder / name if (self._folder / name).exists() and not part.exists() else part

    def _locate(self, path: Path, contents: Contents) -> None:
        try:
            header = header_of(path)
        except SourceError as error:
            raise RuntimeError(f"the safetensors library does not read the header of {path}") from error
        if {name: (entry.dtype, entry.shape) for name, (entry, _) in header.items()} != dict(contents):
            raise RuntimeError(f"the safetensors library reads other tensors from the header of {path}")
        self._offsets |= {name: offset for name, (_, offset) in header.items()}

    def _digest(self, path: Path, name: str, contents: Contents) -> str:
        dtype, shape = contents[name]
        at, digest = self._offsets[name], hashlib.sha256()
        end = at + prod(shape) * dtype.itemsize
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            while at < end and (data := file.read(min(CHUNK, end - at))):
                digest.update(data)
                at += len(data)
        return digest.hexdigest()


class _Place:
    """A tensor in a file, written one stretch of rows after the other."""

    def __init__(self, handle: int, path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._handle, self._path, self._name, self._dtype, self._shape = handle, path, name, dtype, shape
        self._size = prod(shape) * dtype.itemsize
        self._digest, self._done = hashlib.sha256(), 0

    def write(self, piece: Tensor, offset: int) -> None:
        """Append rows; `offset`: where the tensor begins in the file. Raises RuntimeError where they do not fit."""
        dtype, shape = self._dtype, self._shape
        rows = piece.dtype == dtype and piece.dim() == len(shape) and piece.shape[1:] == shape[1:]
        if not rows or self._done + piece.nbytes > self._size:
            raise RuntimeError(
                f"{self._name} is planned as {dtype} {list(shape)}, not {piece.dtype} {list(piece.shape)}"
            )
        if piece.numel():
            data = raw(piece.detach().contiguous().reshape(-1))
            self._digest.update(data)
            with _named(self._path):
                _write_at(self._handle, data, offset + self._done)
            self._done += len(data)

    def whole(self) -> str:
        """sha256 (hex) of the whole tensor. Raises RuntimeError where rows are missing."""
        if self._done != self._size:
            raise RuntimeError(f"{self._name} is planned as {self._size} bytes, not {self._done}")
        return self._digest.hexdigest()


def _changed(path: Path, tensor: str | None = None) -> LilliputError:
    where = str(path) if tensor is None else f"{tensor} in {path}"
    return LilliputError(f"{where} is not what the unfinished run wrote (a power failure?); {START_ANEW}")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the disk name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _write_at(handle: int, data: memoryview, at: int) -> None:
    count = 0
    while count < len(data):
        count += os.pwrite(handle, data[count:], at + count)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
