"""Keys by channel in chunks of tokens, values by token, the latest ones plain (kivi)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lilliput.errors import PlanError
from lilliput.runtime.caches.codec import CacheCodec, CacheShape, CodecSpec, PairCodec, Tensors, pair_bits, turnable
from lilliput.runtime.caches.codec import whole_groups as whole
from lilliput.runtime.caches.coders import PLAIN, Coder, Exact, PerChannel, Turned
from lilliput.runtime.caches.per_token import coder
from lilliput.runtime.caches.sides import Begun, Delayed, Side


@dataclass(frozen=True)
class KiviSpec(CodecSpec):
    """bits, value_bits: of keys and of values, 16: as they are; group_size: tokens of a channel of the keys, and
    channels of a token of the values, that share a scale; residual: tokens of a chunk of keys, and the latest values,
    that stay plain; rotate: values behind a Hadamard transform, and keys too; sinks: first tokens that stay plain."""

    kind: ClassVar[str] = "kivi"

    bits: int
    value_bits: int
    group_size: int = 32
    residual: int = 128
    rotate: bool = False
    sinks: int = 0

    def check(self, shape: CacheShape) -> None:
        if self.group_size < 1:
            raise PlanError("groups of keys are of tokens, so 'channel' is none: give a number of tokens")
        if self.residual % self.group_size:
            raise PlanError(
                f"a residual of {self.residual} tokens is no multiple of groups of {self.group_size}: choose one"
            )
        whole(self.group_size, shape.values)
        if self.rotate:
            turnable(shape.keys, shape.values)

    def _sides(self, shape: CacheShape) -> tuple[Side, Side]:
        keys: Coder = Exact(self.residual)
        if self.bits < PLAIN:
            keys = PerChannel(self.bits, self.group_size, self.residual)
            keys = Turned(keys) if self.rotate else keys
        values = coder(self.value_bits, self.group_size, shape.values, self.rotate)
        sides = Delayed(keys, self.residual, "chunk"), Delayed(values, self.residual, "last")
        return (Begun(sides[0], self.sinks), Begun(sides[1], self.sinks)) if self.sinks else sides

    def make(self, shape: CacheShape, tensors: Tensors) -> CacheCodec:
        return PairCodec(*self._sides(shape), past_only=True)

    def size_bits(self, tokens: int, shape: CacheShape, item: int) -> int:
        return pair_bits(*self._sides(shape), tokens, shape, item)
