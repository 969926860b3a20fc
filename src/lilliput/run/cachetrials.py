"""How blocks are tried with keys and values stored otherwise: in pieces, as an evaluation of the folder reads texts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from lilliput.anatomy.skeleton import Skeleton
from lilliput.plan.contexts import PLAIN, Context, Kept
from lilliput.runtime import caches
from lilliput.streaming.pieces import Pieces
from lilliput.streaming.variants import Pass


def fewest(kept: Kept) -> int:
    """The entry with which a block is tried alone: its loss is the largest, and least of it is other roundings."""
    return min(kept.specs, key=lambda j: kept.sizes[j])


def rising(kept: Kept, count: int) -> list[int]:
    """The entries with which all blocks are tried at once, `count` of them, so that the last is `fewest`."""
    entries = sorted(kept.specs, key=lambda j: -kept.sizes[j])
    return [entries[max(0, len(entries) - count + n)] for n in range(count)]


class CacheTrials:
    """The loaded blocks of a model, run with other caches than their own."""

    def __init__(self, skeleton: Skeleton, context: Context) -> None:
        self._skeleton, self._context = skeleton, context
        self._pieces = Pieces(skeleton, context.chunk)

    def through(self, kept: Kept, entry: int) -> Pass:
        """A sample's way through the block with an entry."""
        return partial(self._through, kept, entry)

    def errors(self, kept: Kept, samples: Iterable[Tensor]) -> list[float]:
        """By entry, the squared errors that it leaves in what the block's attention gives for samples [1, T, H], from
        the first token on that sees anything encoded."""
        totals = [0.0] * len(self._context.entries)
        for hidden in samples:
            before = self._given(kept, PLAIN, hidden)
            for entry in kept.specs:
                error = self._given(kept, entry, hidden) - before
                totals[entry] += float(error.square().sum(dtype=torch.float64))
        return totals

    def _attention(self, kept: Kept) -> nn.Module:
        return self._skeleton.block(kept.block).get_submodule(kept.attention)

    def _through(self, kept: Kept, entry: int, hidden: Tensor) -> Tensor:
        if entry == PLAIN:
            return self._pieces.read(kept.block, hidden)
        turned = kept.specs[entry].turns()
        with caches.tried(self._attention(kept), partial(kept.codec, entry), turned=turned):
            return self._pieces.read(kept.block, hidden)

    def _given(self, kept: Kept, entry: int, hidden: Tensor) -> Tensor:
        """float32 [1, tokens, H]."""
        seen: list[Tensor] = []

        def see(module: nn.Module, args: object, given: Tensor | tuple[Tensor, ...]) -> None:
            seen.append((given if isinstance(given, Tensor) else given[0]).float())

        handle = self._attention(kept).register_forward_hook(see)
        try:
            self._through(kept, entry, hidden)
        finally:
            handle.remove()
        return torch.cat(seen, dim=1)[:, self._context.first :]
