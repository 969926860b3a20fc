"""Static shifts and scales by channel, then dynamic groups by token; only the past is quantized (wkvquant)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lilliput.runtime.caches.codec import CacheCodec, CacheShape, CodecSpec, PairCodec, Shapes, Tensors, pair_bits
from lilliput.runtime.caches.codec import whole_groups as whole
from lilliput.runtime.caches.coders import PLAIN, Coder, Exact, PerToken, Shifted
from lilliput.runtime.caches.sides import Entries

SIDES = ("key", "value")
SHIFT, SCALE = "cache_shift", "cache_scale"


@dataclass(frozen=True)
class ShiftedSpec(CodecSpec):
    """bits, value_bits: of keys and of values, 16: as they are; group_size: neighbouring channels of a token that share
    a scale, 0: all of a head."""

    kind: ClassVar[str] = "wkvquant"

    bits: int
    value_bits: int
    group_size: int = 32

    def check(self, shape: CacheShape) -> None:
        if self.group_size:
            whole(self.group_size, shape.keys, shape.values)

    def stored(self, shape: CacheShape) -> Shapes:
        widths = {"key": shape.keys, "value": shape.values}
        return {
            f"{side}_{name}": (torch.float32, (shape.heads, widths[side])) for side in SIDES for name in (SHIFT, SCALE)
        }

    def _side(self, bits: int, width: int, side: str, tensors: Tensors) -> Entries:
        if bits >= PLAIN:
            return Entries(Exact())
        inner: Coder = PerToken(bits, self.group_size or width, width)
        return Entries(Shifted(inner, tensors.get(f"{side}_{SHIFT}"), tensors.get(f"{side}_{SCALE}")))

    def _sides(self, shape: CacheShape, tensors: Tensors) -> tuple[Entries, Entries]:
        return (
            self._side(self.bits, shape.keys, "key", tensors),
            self._side(self.value_bits, shape.values, "value", tensors),
        )

    def make(self, shape: CacheShape, tensors: Tensors) -> CacheCodec:
        return PairCodec(*self._sides(shape, tensors), past_only=True)

    def size_bits(self, tokens: int, shape: CacheShape, item: int) -> int:
        return pair_bits(*self._sides(shape, {}), tokens, shape, item)
