"""A cache layer of transformers around a codec."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lilliput.errors import LilliputError
from lilliput.runtime.caches.codec import CacheCodec, Incoming

WAITING = 64  # tokens, more than assisted decoding proposes at a time


def _nothing_to_replace(what: str) -> LilliputError:
    return LilliputError(
        f"the {what} of this layer are stored compressed, and something reads or replaces them as plain tensors, as "
        "libraries that drop tokens from the cache do (kvpress): they need a plain cache. Run them on a model without "
        "a step for its cache (`lilliput.runtime.caches.paused(model)` for a while), or leave out the library; of the "
        "caches here sink-window drops tokens"
    )


class CompressedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Takes the place of a `DynamicLayer`. `incoming` is set before each call by the hook of the attention.

    Where a call sees only the past as it is stored, its last tokens, up to `WAITING`, go to the codec with the next
    call: what assisted decoding rejects is cut before that, and leaves no trace.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, codec: CacheCodec) -> None:
        super().__init__()
        self.codec = codec
        self.incoming = Incoming()
        self.record_past = False
        self._waiting: tuple[Tensor, Tensor, Incoming] | None = None
        self._rows = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device, self.dtype = key_states.device, key_states.dtype
        self.is_initialized = True

    @property
    def keys(self) -> Tensor:
        """transformers' layers show their tensors, and other libraries put fewer tokens there, which a compressed layer
        has no place for. Raises LilliputError."""
        raise _nothing_to_replace("keys")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        if value is not None:  # which the base class begins with
            raise _nothing_to_replace("keys")

    @property
    def values(self) -> Tensor:
        """See `keys`."""
        raise _nothing_to_replace("values")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        if value is not None:
            raise _nothing_to_replace("values")

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the tokens of the call attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._settle()
        self._rows = len(key_states)
        incoming, self.incoming = self.incoming, Incoming()
        codec = self.codec
        if not codec.past_only:
            codec.append(key_states, value_states, incoming)
            return codec.materialise()
        if codec.length:
            keys, values = codec.materialise()
            seen = torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)
        else:
            seen = key_states, value_states
        count = key_states.shape[2]
        now = 0 if self.record_past else max(0, count - WAITING)
        if now:
            codec.append(key_states[:, :, :now], value_states[:, :, :now], incoming.part(0, now))
        rest = incoming.part(now, count)
        self._waiting = key_states[:, :, now:].clone(), value_states[:, :, now:].clone(), rest
        return seen

    def _settle(self) -> None:
        """Give the codec what waits."""
        if self._waiting is not None:
            keys, values, incoming = self._waiting
            self._waiting = None
            self.codec.append(keys, values, incoming)

    def places(self, tokens: int) -> Tensor | None:
        """Columns of an attention mask that the next call of so many tokens has, int64 [batch, n]; None: all."""
        self._settle()
        places = self.codec.places()
        if places is None:
            return None
        new = torch.arange(self.codec.length, self.codec.length + tokens, device=places.device)
        return torch.cat([places, new.expand(len(places), -1)], dim=1)

    def get_seq_length(self) -> int:
        return self.codec.length + (0 if self._waiting is None else self._waiting[0].shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # the name before transformers 5.24
        return -1

    @property
    def batch_size(self) -> int:
        return self._rows

    def crop(self, tokens_to_remove: int) -> None:
        """Below 0: remove so many tokens; above: keep so many, as transformers before 5.24 asks for it."""
        length = self.get_seq_length()
        wanted = length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        wanted = max(0, wanted)
        if wanted >= length:
            self._settle()
            return
        if self._waiting is not None and wanted >= self.codec.length:
            keys, values, incoming = self._waiting
            count = wanted - self.codec.length
            self._waiting = (keys[:, :, :count], values[:, :, :count], incoming.part(0, count)) if count else None
        else:
            self._waiting = None
            self.codec.keep(wanted)
        self._settle()

    def _select(self, rows: Tensor) -> None:
        self._settle()
        if self.codec.length:
            self.codec.select(rows)
            self._rows = len(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self._rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.arange(self._rows, device=indices.device)
        self._select(rows[indices])

    def reset(self) -> None:
        self._waiting, self.is_initialized = None, False
        if self.codec.length:
            self.codec.keep(0)

    def offload(self) -> None:
        """Stays where it is: it is small already."""

    def prefetch(self) -> None:
        """See `offload`."""
