"""Texts read in pieces through the compressed cache of each block, so that a token sees what the cache holds of those
before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lilliput.anatomy.cached import filled
from lilliput.anatomy.calls import Calls
from lilliput.anatomy.skeleton import Skeleton
from lilliput.runtime import caches
from lilliput.streaming.forward import Batches
from lilliput.streaming.states import Activations

CHUNK = 128  # tokens of a piece


class Pieces:
    """How the blocks of one model are called for pieces of `chunk` tokens; recorded once for each length of what came
    before."""

    def __init__(self, skeleton: Skeleton, chunk: int) -> None:
        self.skeleton, self.chunk = skeleton, chunk
        self._calls: dict[tuple[int, int, int], Calls] = {}

    def wanted(self, block: int) -> bool:
        """Whether a block stores its keys and values compressed."""
        state = caches.of(self.skeleton.model)
        return state is not None and state.active and self.skeleton.block_names[block] in state.blocks

    def calls(self, batch: int, tokens: int, past: int) -> Calls:
        """The arguments of blocks for `tokens` tokens after `past` others."""
        key = batch, tokens, past
        if key not in self._calls:
            self._calls[key] = self.skeleton.calls(batch, tokens, past)
        return self._calls[key]

    def read(self, block: int, hidden: Tensor) -> Tensor:
        """hidden [B, T, H] through a loaded block, with a cache of its own."""
        cache = filled(self.skeleton.config, len(hidden), 0)
        out = []
        for first in range(0, hidden.shape[1], self.chunk):
            piece = hidden[:, first : first + self.chunk]
            calls = self.calls(len(hidden), piece.shape[1], first)
            out.append(self.skeleton.run(block, piece, calls, cache=cache))
        return torch.cat(out, dim=1)

    def through(
        self, block: int, batches: Batches, inputs: Activations, outputs: Activations
    ) -> list[Callable[[], None]]:
        """`forward.through` piece by piece: each batch with a cache of its own."""

        def one(start: int, stop: int) -> Callable[[], None]:
            def run() -> None:
                outputs.write(start, self.read(block, inputs.read(start, stop).to(self.skeleton.device)))

            return run

        return [one(a, b) for a, b in batches.bounds]
