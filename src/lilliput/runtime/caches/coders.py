"""How the keys or values of a few tokens become bytes: small coders, which can be put around each other.

All take x [batch, heads, tokens, width] and give tensors [batch, heads, entries, ..], one entry for `unit` tokens, so
that what is stored grows, is cut and is sorted along its first axes whatever the coder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lilliput.algebra import hadamard
from lilliput.formats.bits import pack_unsigned, row_bytes, unpack_unsigned

SCALE = torch.float16  # of scales and least values
PLAIN = 16  # bits from which on nothing is quantized


def in_groups(x: Tensor, axis: int, size: int) -> Tensor:
    """x [.., n, ..], n along `axis`, as [.., n / size, size, ..]."""
    axis %= x.dim()
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


class Coder(Protocol):
    @property
    def unit(self) -> int:
        """Tokens of an entry; `encode` takes a multiple of them."""
        ...

    def encode(self, x: Tensor) -> tuple[Tensor, ...]: ...

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """[batch, heads, tokens, width] again."""
        ...

    def size_bits(self, width: int, item: int) -> int:
        """Bits of one entry of one head; item: bits of a plain element."""
        ...


@dataclass(frozen=True)
class Exact:
    """As they are."""

    unit: int = 1

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (in_groups(x, 2, self.unit),)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return parts[0].flatten(2, 3).to(dtype)

    def size_bits(self, width: int, item: int) -> int:
        return self.unit * width * item


def affine(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of `bits` bits, uint8 [.., bytes], and scale and least value of each group of neighbours, float16
    [.., n / group], of x [.., n].

    code = round((x - least) / scale), scale = (greatest - least) / (2^bits - 1), both as they are stored. A group
    beyond what float16 can hold becomes NaN, which every evaluation reports.
    """
    top = (1 << bits) - 1
    rows = in_groups(x.float(), -1, group)
    low = rows.amin(-1, keepdim=True)
    scale = ((rows.amax(-1, keepdim=True) - low) / top).to(SCALE)
    low = low.to(SCALE)
    step = torch.where(scale > 0, scale.float(), torch.inf)
    codes = ((rows - low.float()) / step).round_().clamp_(0, top).nan_to_num_().to(torch.int64).flatten(-2)
    packed = pack_unsigned(codes.flatten(0, -2), bits).view(*codes.shape[:-1], -1)
    return packed, scale.squeeze(-1), low.squeeze(-1)


def from_affine(packed: Tensor, scale: Tensor, low: Tensor, bits: int, width: int, dtype: torch.dtype) -> Tensor:
    """Undo `affine`: [.., width]."""
    codes = unpack_unsigned(packed.flatten(0, -2), bits, width).view(*packed.shape[:-1], width)
    values = in_groups(codes, -1, width // scale.shape[-1]) * scale.float().unsqueeze(-1) + low.float().unsqueeze(-1)
    return values.flatten(-2).to(dtype)


def affine_bits(width: int, bits: int, group: int) -> int:
    """Bits that `affine` makes of `width` values."""
    return 8 * row_bytes(width, bits) + 2 * 8 * SCALE.itemsize * (width // group)


@dataclass(frozen=True)
class PerToken:
    """Each token's vector of each head by itself, in groups of neighbouring channels; `width` has whole groups."""

    bits: int
    group: int
    width: int
    unit: int = 1

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return affine(x, self.bits, self.group)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return from_affine(parts[0], parts[1], parts[2], self.bits, self.width, dtype)

    def size_bits(self, width: int, item: int) -> int:
        return affine_bits(width, self.bits, self.group)


@dataclass(frozen=True)
class PerChannel:
    """Chunks of `unit` tokens, in which each channel of each head is quantized in groups of neighbouring tokens."""

    bits: int
    group: int
    unit: int

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        chunks = in_groups(x, 2, self.unit).transpose(-1, -2)  # [batch, heads, chunks, width, unit]
        return affine(chunks.contiguous(), self.bits, self.group)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        values = from_affine(parts[0], parts[1], parts[2], self.bits, self.unit, dtype)
        return values.transpose(-1, -2).flatten(2, 3)

    def size_bits(self, width: int, item: int) -> int:
        return width * affine_bits(self.unit, self.bits, self.group)


@dataclass(frozen=True)
class Turned:
    """Another coder behind a Hadamard transform of each head's channels, which spreads outliers over all of them."""

    inner: Coder

    @property
    def unit(self) -> int:
        return self.inner.unit

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.inner.encode(hadamard.transform(x.float()))

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return hadamard.transform(self.inner.decode(parts, torch.float32), transposed=True).to(dtype)

    def size_bits(self, width: int, item: int) -> int:
        return self.inner.size_bits(width, item)


@dataclass(frozen=True, eq=False)
class Shifted:
    """Another coder of (x - shift) / scale, both float32 [heads, width], fixed beforehand; None where only sizes
    matter."""

    inner: Coder
    shift: Tensor | None
    scale: Tensor | None

    @property
    def unit(self) -> int:
        return self.inner.unit

    def _fixed(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.shift is None or self.scale is None:
            raise RuntimeError("a cache without its static shifts cannot store anything")
        return self.shift[:, None].to(like.device), self.scale[:, None].to(like.device)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        shift, scale = self._fixed(x)
        return self.inner.encode((x.float() - shift) / scale)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        shift, scale = self._fixed(parts[0])
        return (self.inner.decode(parts, torch.float32) * scale + shift).to(dtype)

    def size_bits(self, width: int, item: int) -> int:
        return self.inner.size_bits(width, item)
