"""What stores the keys and values of one layer, and how the config describes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lilliput.algebra import hadamard
from lilliput.errors import PlanError
from lilliput.runtime.caches.sides import Side
from lilliput.runtime.caches.turns import Turn

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class CacheShape:
    """Heads that have keys and values of their own, and the widths of a key and a value of one head."""

    heads: int
    keys: int
    values: int

    def plain_bits(self, tokens: int, item: int) -> int:
        """Bits of so many tokens as transformers keeps them, `item` bits for each element."""
        return tokens * self.heads * (self.keys + self.values) * item


@dataclass(frozen=True)
class Incoming:
    """What a layer knows of the tokens of a call. turn: the rotation that its keys have had, None where they have none;
    real: bool [batch, all tokens so far], False for padding, None where nobody has said."""

    turn: Turn | None = None
    real: Tensor | None = None

    def part(self, start: int, stop: int) -> Incoming:
        """Of only some tokens of the call."""
        if self.turn is None:
            return self
        turn = self.turn
        return replace(self, turn=replace(turn, cos=turn.cos[:, start:stop], sin=turn.sin[:, start:stop]))


class CacheCodec(ABC):
    """Keys and values of one layer. past_only: the tokens of a call see each other as they are, and only what came
    before as it is stored; pads: it has to know which tokens are padding.

    After any calls its state is that of the token sequence, however it was cut into calls.
    """

    past_only: bool = False
    pads: ClassVar[bool] = False

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens that have come, whether or not they are still there."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, incoming: Incoming) -> None:
        """keys, values [batch, heads, tokens, width]."""

    @abstractmethod
    def materialise(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens that are there, [batch, heads, tokens, width]; one has been appended."""

    @abstractmethod
    def keep(self, tokens: int) -> None:
        """Only the first of all tokens that have come stay."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Rows of the batch, int64 [n], take the place of all."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All that it holds for its tokens."""

    def places(self) -> Tensor | None:
        """Which tokens are there, int64 [batch, n]; None: all of them."""
        return None

    def held_bits(self) -> int:
        """Bits of all that it holds, of all sequences."""
        return sum(8 * x.numel() * x.element_size() for x in self.tensors())


class CodecSpec(ABC):
    """A codec as the config describes it: a frozen dataclass of plain values."""

    kind: ClassVar[str]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"kind": self.kind, **vars(self)}

    @abstractmethod
    def check(self, shape: CacheShape) -> None:
        """Raises PlanError where it cannot store vectors of these widths."""

    @abstractmethod
    def make(self, shape: CacheShape, tensors: Tensors) -> CacheCodec:
        """An empty codec; tensors: those that `stored` describes."""

    @abstractmethod
    def size_bits(self, tokens: int, shape: CacheShape, item: int) -> int:
        """Bits of one sequence of so many tokens; item: bits of a plain element."""

    def stored(self, shape: CacheShape) -> Shapes:
        """Static tensors of a layer: dtype and shape by name."""
        return {}

    def turns(self) -> bool:
        """Whether it has to know by what the keys were rotated."""
        return False


class PairCodec(CacheCodec):
    """Keys and values each for themselves."""

    def __init__(self, keys: Side, values: Side, *, past_only: bool) -> None:
        self.keys, self.values = keys, values
        self.past_only = past_only
        self.dtype = torch.float32

    @property
    def length(self) -> int:
        return self.keys.length

    def append(self, keys: Tensor, values: Tensor, incoming: Incoming) -> None:
        self.dtype = keys.dtype
        self.keys.append(keys)
        self.values.append(values)

    def materialise(self) -> tuple[Tensor, Tensor]:
        return self.keys.read(self.dtype), self.values.read(self.dtype)

    def keep(self, tokens: int) -> None:
        self.keys.keep(tokens)
        self.values.keep(tokens)

    def select(self, rows: Tensor) -> None:
        self.keys.select(rows)
        self.values.select(rows)

    def tensors(self) -> list[Tensor]:
        return [*self.keys.tensors(), *self.values.tensors()]


def pair_bits(keys: Side, values: Side, tokens: int, shape: CacheShape, item: int) -> int:
    """Bits that two sides take."""
    return shape.heads * (keys.size_bits(tokens, shape.keys, item) + values.size_bits(tokens, shape.values, item))


def whole_groups(group: int, *widths: int) -> None:
    """Raises PlanError where a group does not divide what it groups."""
    for width in widths:
        if width % group:
            raise PlanError(
                f"a group of {group} does not divide the {width} channels of a head: choose a `group_size` that does"
            )


def turnable(*widths: int) -> None:
    """Raises PlanError where a head has no Hadamard transform."""
    for width in widths:
        try:
            hadamard.factor(width)
        except PlanError:
            raise PlanError(f"heads of {width} channels have no Hadamard transform: leave `rotate` out") from None
