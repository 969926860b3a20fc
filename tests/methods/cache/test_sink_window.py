from __future__ import annotations

import pytest
import torch

from lilliput.runtime.caches.codec import CacheShape, Incoming
from lilliput.runtime.caches.window import WindowSpec

SHAPE = CacheShape(2, 16, 8)


@pytest.mark.parametrize("tokens", [1, 6, 9, 10, 40])
@pytest.mark.parametrize("padding", [0, 4])
def test_the_first_and_the_latest_stay(tokens: int, padding: int) -> None:
    draw = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, tokens, 16, generator=draw), torch.randn(2, 2, tokens, 8, generator=draw)
    codec = WindowSpec(3, 6).make(SHAPE, {})
    for t in range(tokens):
        real = torch.ones(2, t + 1, dtype=torch.bool)
        real[1, :padding] = False
        codec.append(keys[:, :, t : t + 1], values[:, :, t : t + 1], Incoming(None, real))
    places = codec.places()
    assert places is not None
    for row, left in enumerate((0, padding)):
        stay = set(range(max(0, tokens - 6), tokens)) | set(range(left, min(tokens, left + 3)))
        found = places[row].tolist()
        assert found == sorted(set(found))
        assert stay <= set(found)
        assert len(found) == min(tokens, 9)
        if tokens >= left + 9:
            assert set(found) == stay
        assert torch.equal(codec.materialise()[0][row], keys[row][:, found])
        assert torch.equal(codec.materialise()[1][row], values[row][:, found])
    assert codec.length == tokens
