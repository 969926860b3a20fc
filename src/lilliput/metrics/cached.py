"""Bytes of a compressed cache: of the keys and values of one sequence, in the layers that store them compressed.

Counted by the codecs' own formulas, which are what they hold, to the byte. Scores of such a model are those of a text
that each block reads in pieces, through that cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lilliput.metrics.metric import Metric
from lilliput.model.stored import caches_of, served_dtype
from lilliput.model.weights import Model
from lilliput.runtime.caches import parsed
from lilliput.units import size


@dataclass(frozen=True)
class CacheSize:
    """bytes: of one sequence of `tokens` tokens, plain_bytes: of the same layers without compression; layers:
    compressed ones of `blocks`; chunk: tokens of a piece in the evaluation."""

    tokens: int
    bytes: int
    plain_bytes: int
    layers: int
    blocks: int
    chunk: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))

    def note(self) -> str:
        """In a sentence."""
        where = "all layers" if self.layers == self.blocks else f"{self.layers} of {self.blocks} layers"
        return (
            f"keys and values of {self.tokens} tokens take {size(self.bytes)} in place of {size(self.plain_bytes)} in "
            f"{where}; each block read {self.chunk} tokens at a time, so that a token saw those before its piece as "
            "the cache holds them"
        )


def cache_size(model: Model, tokens: int, chunk: int) -> CacheSize | None:
    """Of an opened model; None for one whose cache is transformers' own."""
    entries = parsed(caches_of(model.source))
    if not entries:
        return None
    item = 8 * served_dtype(model).itemsize
    return CacheSize(
        tokens=tokens,
        bytes=sum(len(x.blocks) * x.spec.size_bits(tokens, x.shape, item) for x in entries) // 8,
        plain_bytes=sum(len(x.blocks) * x.shape.plain_bits(tokens, item) for x in entries) // 8,
        layers=sum(len(x.blocks) for x in entries),
        blocks=len(model.skeleton.block_names),
        chunk=min(chunk, tokens),
    )


METRIC = Metric(
    how="lilliput eval DIR",
    key="cache.bytes, cache.plain_bytes",
    unit="bytes",
    interval="none: counted exactly",
    covers=(),
)
