"""A cache that keeps nothing and shows what it is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lilliput.runtime.caches.codec import CacheCodec, Incoming
from lilliput.runtime.caches.turns import undo


class Watched(CacheCodec):
    """`seen(keys, values)`: of each call, float32 [batch, heads, tokens, width]; turned: keys before their rotation. A
    call sees itself and nothing before. leaves: what is shown are leaves that the call's outputs depend on."""

    def __init__(self, seen: Callable[[Tensor, Tensor], None], *, turned: bool, leaves: bool = False) -> None:
        self.seen, self.turned, self.leaves = seen, turned, leaves
        self._latest = torch.empty(0), torch.empty(0)

    @property
    def length(self) -> int:
        return 0

    def append(self, keys: Tensor, values: Tensor, incoming: Incoming) -> None:
        self._latest = keys, values
        raw, turn = keys.detach().float(), incoming.turn if self.turned else None
        if turn is not None:
            raw = undo(raw, turn.cos, turn.sin, turn.rotate)
        plain = values.detach().float()
        if self.leaves:
            raw, plain = raw.requires_grad_(), plain.requires_grad_()
            again = raw if turn is None else turn.rotate(raw, turn.cos, turn.sin)
            self._latest = again.to(keys.dtype), plain.to(values.dtype)
        self.seen(raw, plain)

    def materialise(self) -> tuple[Tensor, Tensor]:
        return self._latest

    def keep(self, tokens: int) -> None:
        """There is nothing."""

    def select(self, rows: Tensor) -> None:
        """There is nothing."""

    def tensors(self) -> list[Tensor]:
        return []
