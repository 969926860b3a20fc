"""The metadata of a GGUF file as transformers wants to read it, without an object for every word of the vocabulary.

gguf's own reader makes several numpy objects and Python lists for each string: with 262,144 tokens and their merges
that took 0.9 GB and 17 s, each time that a config or a tokenizer was made of the file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import gguf
import numpy as np
from numpy.typing import NDArray

from lilliput.source.gguf_header import ARRAY, SIZES, STRING, read_header

NUMBERS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


class Strings(Sequence[memoryview]):
    """Strings that follow one another in a header, each after its length; indexed by where they begin."""

    def __init__(self, blob: memoryview, starts: NDArray[np.int64]) -> None:
        self._blob = blob
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> Strings: ...
    def __getitem__(self, index: int | slice) -> memoryview | Strings:
        if isinstance(index, slice):
            return Strings(self._blob, self._starts[index])
        start = int(self._starts[index])
        return self._blob[start + 8 : start + 8 + struct.unpack_from("<Q", self._blob, start)[0]]


@dataclass(frozen=True)
class Field:
    """A value: `parts[i]` for each i of `data` is an element, a string's bytes or an array [1] of a number.

    types: its type as GGUF numbers them; of an array, ARRAY and that of its elements.
    """

    name: str
    types: list[int]
    parts: Strings | NDArray[np.generic]
    data: range


@dataclass(frozen=True)
class NamedTensor:
    name: str


class Metadata:
    """What `gguf.GGUFReader` is to transformers, as long as it wants no tensors: `fields` by key and `tensors`' names.

    Arrays of arrays, which mean nothing to transformers, are left out. Raises SourceError where the file is no whole
    GGUF file.
    """

    def __init__(self, path: str | os.PathLike[str], mode: str = "r") -> None:
        file = Path(path)
        header = read_header(file)
        with file.open("rb") as opened:
            self._blob = memoryview(opened.read(header.nbytes))
        self.tensors = [NamedTensor(name) for name in header.tensors]
        self.fields: dict[str, Field] = {}
        count = struct.unpack_from("<Q", self._blob, 16)[0]
        at = 24
        for _ in range(count):
            key, at = self._string(at)
            kind, at = self._number(at)
            at = self._value(key, kind, at)

    def get_field(self, key: str) -> Field | None:
        return self.fields.get(key)

    def _number(self, at: int) -> tuple[int, int]:
        return int(struct.unpack_from("<I", self._blob, at)[0]), at + 4

    def _string(self, at: int) -> tuple[str, int]:
        end = at + 8 + int(struct.unpack_from("<Q", self._blob, at)[0])
        return bytes(self._blob[at + 8 : end]).decode("utf-8", errors="replace"), end

    def _value(self, key: str, kind: int, at: int) -> int:
        """Take over the value at a place, and return the place after it."""
        types, length = [kind], 1
        if kind == ARRAY:
            inner, at = self._number(at)
            types, length, at = [kind, inner], int(struct.unpack_from("<Q", self._blob, at)[0]), at + 8
            kind = inner
        if kind == ARRAY:
            for _ in range(length):
                at = self._value("", kind, at)
            return at
        parts: Strings | NDArray[np.generic]
        if kind == STRING:
            starts = np.empty(length, dtype=np.int64)
            blob, size_at = self._blob, struct.Struct("<Q").unpack_from
            for i in range(length):
                starts[i] = at
                at += 8 + size_at(blob, at)[0]
            parts = Strings(self._blob, starts)
        else:
            end = at + length * SIZES[kind]
            parts = np.frombuffer(self._blob[at:end], dtype=NUMBERS[kind]).reshape(length, 1)
            at = end
        if key:
            self.fields[key] = Field(key, types, parts, range(length))
        return at


@contextmanager
def lean() -> Iterator[None]:
    """While the context lasts, transformers reads the metadata of GGUF files through `Metadata`."""
    whole = gguf.GGUFReader
    gguf.GGUFReader = Metadata  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = whole  # type: ignore[misc]
