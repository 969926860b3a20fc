"""A cache for training: keys and values as they would be stored, with the gradients of what came.

Every call is a whole text. Nothing is kept between calls, so that a block may be computed again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lilliput.anatomy.cached import filled
from lilliput.errors import LilliputError
from lilliput.formats.rounding import through
from lilliput.runtime.caches.codec import CacheCodec, Incoming
from lilliput.runtime.caches.layer import CompressedLayer

_KNOWN = ("DynamicLayer", "DynamicSlidingWindowLayer")


class StraightLayer(CompressedLayer):
    """Takes the place of an empty layer for one pass; make: gives the codec (None: keys and values stay)."""

    def __init__(self, make: Callable[[], CacheCodec], rounds: bool, sliding: bool) -> None:
        super().__init__(make())
        self._make, self._rounds = make, rounds
        self.is_sliding = sliding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the tokens of the text attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        incoming, self.incoming = self.incoming, Incoming()
        if not self._rounds:
            return key_states, value_states
        codec = self._make()
        with torch.no_grad():
            codec.append(key_states.detach(), value_states.detach(), incoming)
            keys, values = codec.materialise()
        return through(key_states, keys), through(value_states, values)


class _Nothing(CacheCodec):
    """Of a layer whose keys and values stay as they are."""

    length = 0

    def append(self, keys: Tensor, values: Tensor, incoming: Incoming) -> None:
        raise RuntimeError("nothing is stored here")

    def materialise(self) -> tuple[Tensor, Tensor]:
        raise RuntimeError("nothing is stored here")

    def keep(self, tokens: int) -> None:
        """There is nothing."""

    def select(self, rows: Tensor) -> None:
        """There is nothing."""

    def tensors(self) -> list[Tensor]:
        return []


def cache(config: Any, makers: Mapping[int, Callable[[], CacheCodec]]) -> Any:
    """A cache for one pass over whole texts; makers: codecs by the number of the layer.

    Raises LilliputError for a model with other layers than those of attentions.
    """
    out = filled(config, 1, 0)
    while makers and len(out.layers) <= max(makers):
        from transformers.cache_utils import DynamicLayer

        out.layers.append(DynamicLayer())
    for number, layer in enumerate(out.layers):
        if type(layer).__name__ not in _KNOWN:
            raise LilliputError(
                f"layer {number} keeps a {type(layer).__name__}, and models are trained with a compressed cache whose "
                "layers keep keys and values alone: leave the step for the cache out"
            )
        make = makers.get(number)
        out.layers[number] = StraightLayer(make or _Nothing, make is not None, bool(layer.is_sliding))
    return out
