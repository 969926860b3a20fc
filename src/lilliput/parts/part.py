"""What a term of a compressed linear layer is to the rest: values, an exact size, and the tensors that a file holds.

A spec is known from shapes alone, before any weight is read: the plan counts its bytes and config.json describes it. A
part is a spec with its values, the result of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self

from torch import Tensor

from lilliput.formats.format import Stored

Get = Callable[[str], Tensor]  # a stored tensor by the suffix of its name


class PartSpec(Protocol):
    """A part before its values; frozen and comparable."""

    def describe(self) -> str:
        """For tables, in a few words."""
        ...

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size of a [rows, width] part, without padding to bytes."""
        ...

    def stored(self, rows: int, width: int) -> Stored:
        """Tensors in the file, by suffix: "" is the payload, one-dimensional."""
        ...

    def operations(self, rows: int, width: int) -> int:
        """Multiplications and additions that decoding takes in matrix products; looking codes up is none."""
        ...

    def add_to(self, out: Tensor, get: Get) -> None:
        """Add the values of the stored tensors to `out` [rows, width], any float dtype, in place."""
        ...

    def plain(self) -> dict[str, Any]:
        """The entry of config.json, with the part's `kind`; `parts.known.from_plain` reads it back."""
        ...


class Part(Protocol):
    """One term of the sum."""

    @property
    def spec(self) -> PartSpec:
        """What the plan knew of it."""
        ...

    def decode(self) -> Tensor:
        """Its values, float32 [out, in]."""
        ...

    def bits(self) -> int:
        """Exact size, without padding to bytes."""
        ...

    def pack(self) -> dict[str, Tensor]:
        """The tensors that `spec.stored` describes."""
        ...

    def rows(self, start: int, stop: int) -> Self:
        """Output rows [start, stop)."""
        ...


def below(get: Get, prefix: str) -> Get:
    """The tensors of a part within a part: their suffixes follow `prefix`."""
    return lambda suffix: get(prefix + suffix)
