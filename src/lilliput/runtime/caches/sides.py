"""What a cache holds of one side, keys or values: entries that grow along the tokens, and the plain ones that wait."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from lilliput.runtime.caches.coders import Coder, Exact


class Side(Protocol):
    """Keys or values of one layer."""

    @property
    def length(self) -> int:
        """Tokens that it holds."""
        ...

    def append(self, x: Tensor) -> None:
        """x [batch, heads, tokens, width]."""
        ...

    def read(self, dtype: torch.dtype) -> Tensor:
        """[batch, heads, length, width]."""
        ...

    def keep(self, tokens: int) -> None:
        """Only the first ones stay."""
        ...

    def select(self, rows: Tensor) -> None:
        """Rows of the batch, int64 [n], take the place of all."""
        ...

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        ...

    def size_bits(self, tokens: int, width: int, item: int) -> int:
        """Bits of so many tokens of one head, in which a plain element has `item` bits."""
        ...


class Entries:
    """Tokens that are encoded at once."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self.parts: tuple[Tensor, ...] = ()

    @property
    def length(self) -> int:
        return self.parts[0].shape[2] * self.coder.unit if self.parts else 0

    def append(self, x: Tensor) -> None:
        new = self.coder.encode(x)
        old = self.parts or tuple(part[:, :, :0] for part in new)
        # A copy even where nothing is there yet: what comes in may be a view of something larger.
        self.parts = tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.coder.decode(self.parts, dtype)

    def keep(self, tokens: int) -> None:
        self.parts = tuple(part[:, :, : tokens // self.coder.unit].clone() for part in self.parts)

    def drop(self, tokens: int) -> None:
        """The first ones leave."""
        self.parts = tuple(part[:, :, tokens // self.coder.unit :].clone() for part in self.parts)

    def select(self, rows: Tensor) -> None:
        self.parts = tuple(part.index_select(0, rows.to(part.device)) for part in self.parts)

    def tensors(self) -> list[Tensor]:
        return list(self.parts)

    def size_bits(self, tokens: int, width: int, item: int) -> int:
        return tokens // self.coder.unit * self.coder.size_bits(width, item)


class Delayed:
    """Tokens that stay plain at first. waits "chunk": until `residual` of them, one entry of the coder, are there;
    "last": the last `residual` ones always are."""

    def __init__(self, coder: Coder, residual: int, waits: Literal["chunk", "last"]) -> None:
        self.head = Entries(coder)
        self.tail = Entries(Exact())
        self.residual = residual
        self.waits = waits

    @property
    def length(self) -> int:
        return self.head.length + self.tail.length

    def _due(self, waiting: int) -> int:
        return waiting - waiting % self.residual if self.waits == "chunk" else max(0, waiting - self.residual)

    def append(self, x: Tensor) -> None:
        self.tail.append(x)
        due = self._due(self.tail.length)
        if due:
            self.head.append(self.tail.read(x.dtype)[:, :, :due])
            self.tail.drop(due)

    def read(self, dtype: torch.dtype) -> Tensor:
        sides = [side.read(dtype) for side in (self.head, self.tail) if side.length]
        return sides[0] if len(sides) == 1 else torch.cat(sides, dim=2)

    def keep(self, tokens: int) -> None:
        if tokens >= self.head.length:
            self.tail.keep(tokens - self.head.length)
            return
        # The plain values of a chunk that is cut are gone; those that were read from it take their place.
        whole = tokens - tokens % self.head.coder.unit
        rest = self.head.read(self.tail.parts[0].dtype)[:, :, whole:tokens]
        self.head.keep(whole)
        self.tail.keep(0)
        self.tail.append(rest)

    def select(self, rows: Tensor) -> None:
        self.head.select(rows)
        self.tail.select(rows)

    def tensors(self) -> list[Tensor]:
        return [*self.head.tensors(), *self.tail.tensors()]

    def size_bits(self, tokens: int, width: int, item: int) -> int:
        due = self._due(tokens)
        return self.head.size_bits(due, width, item) + self.tail.size_bits(tokens - due, width, item)


class Begun:
    """The first tokens stay plain, all others are another side's."""

    def __init__(self, rest: Side, sinks: int) -> None:
        self.first = Entries(Exact())
        self.rest = rest
        self.sinks = sinks

    @property
    def length(self) -> int:
        return self.first.length + self.rest.length

    def append(self, x: Tensor) -> None:
        plain = min(self.sinks - self.first.length, x.shape[2])
        if plain:
            self.first.append(x[:, :, :plain])
        if plain < x.shape[2]:
            self.rest.append(x[:, :, plain:])

    def read(self, dtype: torch.dtype) -> Tensor:
        sides = [side.read(dtype) for side in (self.first, self.rest) if side.length]
        return sides[0] if len(sides) == 1 else torch.cat(sides, dim=2)

    def keep(self, tokens: int) -> None:
        self.first.keep(min(tokens, self.first.length))
        if self.rest.length:
            self.rest.keep(max(0, tokens - self.sinks))

    def select(self, rows: Tensor) -> None:
        self.first.select(rows)
        self.rest.select(rows)

    def tensors(self) -> list[Tensor]:
        return [*self.first.tensors(), *self.rest.tensors()]

    def size_bits(self, tokens: int, width: int, item: int) -> int:
        plain = min(tokens, self.sinks)
        return self.first.size_bits(plain, width, item) + self.rest.size_bits(tokens - plain, width, item)
