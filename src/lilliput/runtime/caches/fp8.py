"""Keys and values as e4m3, each side of a layer with one static scale (kv-fp8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lilliput.runtime.caches.codec import CacheCodec, CacheShape, CodecSpec, PairCodec, Shapes, Tensors, pair_bits
from lilliput.runtime.caches.sides import Entries

KEY, VALUE = "k_scale", "v_scale"  # as compressed-tensors and vLLM name them
FLOAT = torch.float8_e4m3fn
TOP = torch.finfo(FLOAT).max


@dataclass(frozen=True, eq=False)
class SmallFloat:
    """x / scale as e4m3, what is beyond its range at its end; scale: one value, None where only sizes matter. A NaN
    stays one."""

    scale: Tensor | None
    unit: int = 1

    def _scale(self, like: Tensor) -> Tensor:
        if self.scale is None:
            raise RuntimeError("a cache without its static scale cannot store anything")
        return self.scale.float().reshape(()).to(like.device)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        codes = (x.float() / self._scale(x)).clamp_(-TOP, TOP).to(FLOAT)
        return (codes.view(torch.uint8),)  # not every operator that sorts and joins entries knows 8-bit floats

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return (parts[0].view(FLOAT).float() * self._scale(parts[0])).to(dtype)

    def size_bits(self, width: int, item: int) -> int:
        return 8 * width


@dataclass(frozen=True)
class Fp8Spec(CodecSpec):
    """Nothing is left to choose."""

    kind: ClassVar[str] = "kv-fp8"

    def check(self, shape: CacheShape) -> None:
        """It stores any."""

    def stored(self, shape: CacheShape) -> Shapes:
        return dict.fromkeys((KEY, VALUE), (torch.float32, (1,)))

    def _sides(self, tensors: Tensors) -> tuple[Entries, Entries]:
        return Entries(SmallFloat(tensors.get(KEY))), Entries(SmallFloat(tensors.get(VALUE)))

    def make(self, shape: CacheShape, tensors: Tensors) -> CacheCodec:
        return PairCodec(*self._sides(tensors), past_only=False)

    def size_bits(self, tokens: int, shape: CacheShape, item: int) -> int:
        return pair_bits(*self._sides({}), tokens, shape, item)
