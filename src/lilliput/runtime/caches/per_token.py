"""Keys and values of each token and head by themselves, as soon as they come (kv-rtn)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lilliput.runtime.caches.codec import CacheCodec, CacheShape, CodecSpec, PairCodec, Tensors, pair_bits, turnable
from lilliput.runtime.caches.codec import whole_groups as whole
from lilliput.runtime.caches.coders import PLAIN, Coder, Exact, PerToken, Turned
from lilliput.runtime.caches.sides import Entries


def coder(bits: int, group: int, width: int, rotate: bool) -> Coder:
    """Of the vectors of single tokens; group 0: a whole head."""
    if bits >= PLAIN:
        return Exact()
    inner = PerToken(bits, group or width, width)
    return Turned(inner) if rotate else inner


@dataclass(frozen=True)
class PerTokenSpec(CodecSpec):
    """bits, value_bits: of keys and of values, 16: as they are; group_size: neighbouring channels that share a scale
    and a least value, 0: all of a head; rotate: behind a Hadamard transform."""

    kind: ClassVar[str] = "kv-rtn"

    bits: int
    value_bits: int
    group_size: int = 32
    rotate: bool = False

    def check(self, shape: CacheShape) -> None:
        if self.group_size:
            whole(self.group_size, shape.keys, shape.values)
        if self.rotate:
            turnable(shape.keys, shape.values)

    def _sides(self, shape: CacheShape) -> tuple[Entries, Entries]:
        return (
            Entries(coder(self.bits, self.group_size, shape.keys, self.rotate)),
            Entries(coder(self.value_bits, self.group_size, shape.values, self.rotate)),
        )

    def make(self, shape: CacheShape, tensors: Tensors) -> CacheCodec:
        return PairCodec(*self._sides(shape), past_only=False)

    def size_bits(self, tokens: int, shape: CacheShape, item: int) -> int:
        return pair_bits(*self._sides(shape), tokens, shape, item)
