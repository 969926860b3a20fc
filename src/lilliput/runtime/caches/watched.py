"""A cache that keeps nothing and shows what it is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lilliput.runtime.caches.codec import CacheCodec, Incoming
from lilliput.runtime.caches.turns import undo


class Watched(CacheCodec):
    """`seen(keys, values)`: of each call, float32 [batch, heads, tokens, width]; turned: keys before their rotation. A
    call sees itself and nothing before."""

    def __init__(self, seen: Callable[[Tensor, Tensor], None], *, turned: bool) -> None:
        self.seen, self.turned = seen, turned
        self._latest = torch.empty(0), torch.empty(0)

    @property
    def length(self) -> int:
        return 0

    def append(self, keys: Tensor, values: Tensor, incoming: Incoming) -> None:
        self._latest = keys, values
        raw, turn = keys.float(), incoming.turn
        if self.turned and turn is not None:
            raw = undo(raw, turn.cos, turn.sin, turn.rotate)
        self.seen(raw.detach(), values.detach().float())

    def materialise(self) -> tuple[Tensor, Tensor]:
        return self._latest

    def keep(self, tokens: int) -> None:
        """There is nothing."""

    def select(self, rows: Tensor) -> None:
        """There is nothing."""

    def tensors(self) -> list[Tensor]:
        return []
