"""my-method against a slow version written from its equations, in float64."""

from __future__ import annotations

import torch

from lilliput.methods.cache.my_method import Options, codec
from lilliput.runtime.caches.codec import CacheShape, Incoming


def test_what_is_read_is_what_was_rounded() -> None:
    draw, shape = torch.Generator().manual_seed(0), CacheShape(heads=2, keys=8, values=4)
    keys, values = torch.randn(1, 2, 5, 8, generator=draw), torch.randn(1, 2, 5, 4, generator=draw)
    spec = codec(3, 4, Options(), False)
    cache = spec.make(shape, {})
    cache.append(keys, values, Incoming())
    # replace: your equations, as slow and obvious as they come
    for found, x, bits in zip(cache.materialise(), (keys, values), (3, 4), strict=True):
        for group, wanted in zip(found.flatten().split(4), x.flatten().split(4), strict=True):
            low, high = float(wanted.min()), float(wanted.max())
            step = (high - low) / (2**bits - 1)
            for a, b in zip(group.tolist(), wanted.tolist(), strict=True):
                assert abs(a - (low + step * round((b - low) / step))) < 0.01
    assert cache.held_bits() == spec.size_bits(5, shape, 32)
