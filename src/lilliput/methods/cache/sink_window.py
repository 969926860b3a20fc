"""Sink and window: the first tokens and the latest ones stay in the cache, what lies between leaves it.

After l > S + W tokens the keys and values of the first S and of the last W are there, as they are; S is `sinks`, W
`window`. Attention needs the first tokens although they say little: softmax has to go somewhere. Positions stay those
of the text. Padding on the left is no token: each sequence of a batch has its own first ones. Tokens of one call see
all that was there before and each other.

Paper: Xiao et al. 2024 (StreamingLLM), arXiv 2309.17453, where positions are counted within the cache. Cost: at most
S + W tokens, with 32 bits each for its place. Limits: what has left is forgotten; text beyond the positions that a
model knows is not made readable by it.
"""

from __future__ import annotations

from pydantic import Field

from lilliput.runtime.caches.codec import CodecSpec
from lilliput.runtime.caches.window import WindowSpec
from lilliput.verbs.cache import Cache
from lilliput.verbs.cache import Options as Common


class Options(Common):
    """See the module's docstring."""

    sinks: int = Field(4, ge=0, description="S: first tokens that stay")
    window: int = Field(1024, ge=1, description="W: latest tokens that stay")


def codec(bits: int, group: int, o: Options, turned: bool) -> CodecSpec:
    """How keys and values are stored."""
    return WindowSpec(o.sinks, o.window)


METHOD = Cache(
    paper="Xiao et al. 2024, arXiv 2309.17453",
    options=Options,
    needs=(),
    covers={},
    codec=codec,
    uses=(),
    note="Of a long text the model sees the first and the latest tokens only: see docs/kv-cache.md.",
)
