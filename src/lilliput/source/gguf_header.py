"""Where each tensor of a GGUF file lies: the header walked with plain reads.

gguf's own reader maps the file and makes several objects for every word of the vocabulary: 4 s and 160 MB for 49 k.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lilliput.errors import SourceError

SIZES = {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}  # bytes of a metadata value by its type
STRING, ARRAY, UINT32 = 8, 9, 4
MOST = 1 << 31  # no count or length of a sound header is larger


@dataclass(frozen=True)
class Stretch:
    """A tensor's bytes in the file; shape in torch order."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """nbytes: of the header itself, up to where the tensors' bytes begin."""

    architecture: str
    tensors: dict[str, Stretch]
    nbytes: int


class _Cursor:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("it ends inside its header")
        return data

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0])

    def count(self) -> int:
        value = self.number("Q")
        if value > MOST:
            raise ValueError(f"its header holds an impossible length, {value}")
        return value

    def string(self) -> str:
        return self.take(self.count()).decode("utf-8", errors="replace")

    def skip_strings(self, count: int) -> None:
        """Pass over so many strings: the words of a vocabulary, which may be half a million."""
        read_bytes, unpack = self.file.read, struct.Struct("<Q").unpack
        for _ in range(count):
            (size,) = unpack(read_bytes(8))
            if size > MOST or len(read_bytes(size)) != size:
                raise ValueError("it ends inside its header")

    def value(self, kind: int) -> str | int | None:
        """A string or uint32, which are used here; everything else is passed over."""
        if kind == STRING:
            return self.string()
        if kind == UINT32:
            return self.number("I")
        if kind == ARRAY:
            inner, length = self.number("I"), self.count()
            if inner in SIZES:
                self.take(SIZES[inner] * length)
            elif inner == STRING:
                self.skip_strings(length)
            else:
                for _ in range(length):
                    self.value(inner)
            return None
        if kind not in SIZES:
            raise ValueError(f"its header holds a value of unknown type {kind}")
        self.take(SIZES[kind])
        return None


def read_header(path: Path) -> Header:
    """Raises SourceError: not GGUF, an unknown version, cut inside the header or the data, split over several files."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header = _walk(_Cursor(file))
    except (ValueError, struct.error) as error:
        raise SourceError(f"{path} is no whole GGUF file: {error}. Copy or download it again.") from error
    tensors = {}
    for name, stretch in header.tensors.items():
        offset = header.nbytes + stretch.offset
        if offset + stretch.nbytes > size:
            raise SourceError(
                f"{path} is truncated: tensor {name} ends at byte {offset + stretch.nbytes} and the file at {size}. "
                "Copy or download it again."
            )
        tensors[name] = Stretch(stretch.shape, stretch.kind, offset, stretch.nbytes)
    return Header(header.architecture, tensors, header.nbytes)


def _walk(cursor: _Cursor) -> Header:
    """The header, in which offsets count from its end."""
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with the letters GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"it has version {version}, and 2 and 3 can be read")
    tensor_count, value_count = cursor.count(), cursor.count()
    values: dict[str, str | int | None] = {}
    for _ in range(value_count):
        key = cursor.string()
        values[key] = cursor.value(cursor.number("I"))
    tensors = {}
    for _ in range(tensor_count):
        name = cursor.string()
        shape = tuple(reversed([cursor.count() for _ in range(cursor.number("I"))]))
        kind = GGMLQuantizationType(cursor.number("I"))
        offset = cursor.number("Q")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        tensors[name] = Stretch(shape, kind, offset, prod(shape) // block * block_bytes)
    alignment = values.get("general.alignment")
    step = alignment if isinstance(alignment, int) and alignment > 0 else 32
    return Header(str(values.get("general.architecture", "?")), tensors, -(-cursor.file.tell() // step) * step)
