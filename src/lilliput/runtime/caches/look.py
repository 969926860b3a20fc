"""What a block hands to its cache, seen on the meta device: no weight is loaded, nothing is computed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lilliput.anatomy.calls import Call, Calls
from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import SourceError
from lilliput.runtime.caches.codec import CacheShape

META = "meta"


class _SeenError(Exception):
    """Ends the pass once keys and values are there."""


class _Looking:
    """Stands in for a cache, as far as an attention asks one."""

    def __init__(self) -> None:
        self.found: CacheShape | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> None:
        self.found = CacheShape(keys.shape[1], keys.shape[-1], values.shape[-1])
        raise _SeenError


def _meta(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.to(META)
    if isinstance(x, list | tuple):
        return type(x)(map(_meta, x))
    return x


def shape_of(skeleton: Skeleton, block: int) -> CacheShape:
    """What block `block` stores of a token. Raises SourceError where it stores nothing."""
    calls, looking = skeleton.calls(1, 2, past=0), _Looking()
    call = calls.layers[block]
    moved = Call(_meta(call.args), {name: _meta(x) for name, x in call.kwargs.items()}, call.keyword)
    layers = tuple(moved if n == block else x for n, x in enumerate(calls.layers))
    hidden = torch.empty(1, 2, skeleton.hidden_size, dtype=skeleton.dtype, device=META)
    held = {**dict(skeleton.block(block).named_parameters()), **dict(skeleton.block(block).named_buffers())}
    with suppress(_SeenError):
        recorded = Calls(calls.shape, layers, calls.cache)
        skeleton.run(block, hidden, recorded, {name: _meta(x) for name, x in held.items()}, cache=looking)
    if looking.found is None:
        raise SourceError(f"{type(skeleton.block(block)).__name__} hands nothing to its cache")
    return looking.found
