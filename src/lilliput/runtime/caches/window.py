"""The first tokens and the latest ones stay, as they are; those between leave (sink-window)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lilliput.runtime.caches.codec import CacheCodec, CacheShape, CodecSpec, Incoming, Tensors

PLACE = torch.int32


class WindowCodec(CacheCodec):
    """Padding on the left counts as no token: each sequence has its own first ones."""

    past_only = True
    pads: ClassVar[bool] = True

    def __init__(self, sinks: int, window: int) -> None:
        self.sinks, self.window = sinks, window
        self.seen = 0
        self.parts: list[Tensor] = []  # keys, values [batch, heads, n, width], and their places int32 [batch, n]

    @property
    def length(self) -> int:
        return self.seen

    def append(self, keys: Tensor, values: Tensor, incoming: Incoming) -> None:
        batch, _, tokens, _ = keys.shape
        places = torch.arange(self.seen, self.seen + tokens, dtype=PLACE, device=keys.device).expand(batch, -1)
        new = [keys, values, places]
        old = self.parts or [keys[:, :, :0], values[:, :, :0], places[:, :0]]
        self.parts = [torch.cat(pair, dim=-2 if pair[0].dim() == 4 else -1) for pair in zip(old, new, strict=True)]
        self.seen += tokens
        self._leave(incoming.real)

    def _leave(self, real: Tensor | None) -> None:
        keys, values, places = self.parts
        room = self.sinks + self.window
        if places.shape[1] <= room:
            return
        # Padding leaves first, then what is neither among the first real tokens nor among the latest.
        late = places >= self.seen - self.window
        if real is None:
            padding = torch.zeros_like(late)
        else:
            padding = ~real.expand(len(places), -1).to(places.device).gather(1, places.long())
        early = (~padding).cumsum(1) <= self.sinks
        rank = torch.where(late, 3, torch.where(padding, 0, torch.where(early, 2, 1)))
        # As many stay of each sequence; of equals the later ones.
        order = (rank * (self.seen + 1) + places).argsort(dim=1, descending=True)[:, :room].sort(dim=1).values
        index = order[:, None, :, None]
        self.parts = [
            keys.gather(2, index.expand(-1, keys.shape[1], -1, keys.shape[3])),
            values.gather(2, index.expand(-1, values.shape[1], -1, values.shape[3])),
            places.gather(1, order),
        ]

    def materialise(self) -> tuple[Tensor, Tensor]:
        return self.parts[0], self.parts[1]

    def places(self) -> Tensor | None:
        return self.parts[2].long() if self.parts else None

    def keep(self, tokens: int) -> None:
        """What had left before the cut does not come back."""
        if tokens == 0 or not self.parts:
            self.parts, self.seen = [], 0
            return
        stay = (self.parts[2] < tokens).sum(1)
        count = int(stay.min())
        self.parts = [x[..., :count, :].clone() if x.dim() == 4 else x[:, :count].clone() for x in self.parts]
        self.seen = tokens

    def select(self, rows: Tensor) -> None:
        self.parts = [x.index_select(0, rows.to(x.device)) for x in self.parts]

    def tensors(self) -> list[Tensor]:
        return self.parts


@dataclass(frozen=True)
class WindowSpec(CodecSpec):
    """sinks: first tokens that stay; window: latest tokens that stay."""

    kind: ClassVar[str] = "sink-window"

    sinks: int
    window: int

    def check(self, shape: CacheShape) -> None:
        """It stores any."""

    def make(self, shape: CacheShape, tensors: Tensors) -> CacheCodec:
        return WindowCodec(self.sinks, self.window)

    def size_bits(self, tokens: int, shape: CacheShape, item: int) -> int:
        kept = min(tokens, self.sinks + self.window)
        return shape.plain_bits(kept, item) + 8 * PLACE.itemsize * kept
