"""KIVI: keys rounded by channel in chunks of tokens, values by token, the latest tokens plain.

Keys have a few large channels, values have none. After l tokens the first l - (l mod R) keys are stored in chunks of R
tokens, in which each channel of a head is cut into groups of G tokens, and all but the last R values, each token's
vector of a head cut into groups of G channels; R is `residual`, G the target's group. A group x becomes

    code = round((x - m) / s),    s = (max x - m) / (2^b - 1),    m = min x,

s and m in float16. The others stay as they are. Tokens of one call see each other, and themselves, as they are, and
those before as they are stored: a prompt that is read at once is not changed by its own cache. With `rotate` keys and
values are multiplied by a Hadamard matrix first, which spreads the large channels that keys are cut by here. The first
`sinks` tokens of a sequence can stay plain: those that all others attend to have keys unlike any, and in a chunk widen
the ranges of its others.

Paper: Liu et al. 2024, arXiv 2402.02750. Cost: b + 32 / G bits for each element of what is stored, and up to R plain
keys and values. Limits: keys are rounded after their rotation by position; padding on the left of a batch lies in the
chunks and widens their ranges; where a cache is cut into a chunk (by other means than assisted decoding, which is
prepared), the rest of that chunk is kept as it was read.
"""

from __future__ import annotations

from pydantic import Field

from lilliput.runtime.caches.codec import CodecSpec
from lilliput.runtime.caches.kivi import KiviSpec
from lilliput.verbs.cache import Cache
from lilliput.verbs.cache import Options as Common


class Options(Common):
    """See the module's docstring."""

    residual: int = Field(128, ge=1, description="R: tokens of a chunk of keys, and latest values that stay plain")
    value_bits: int | None = Field(None, ge=2, le=16, description="bits of values, 16: as they are; none: as of keys")
    rotate: bool = Field(False, description="round behind a Hadamard transform of each head")
    sinks: int = Field(0, ge=0, description="first tokens of a sequence, padding included, that stay plain")


def codec(bits: int, group: int, o: Options, turned: bool) -> CodecSpec:
    """How keys and values are stored."""
    return KiviSpec(bits, o.value_bits or bits, group, o.residual, o.rotate, o.sinks)


METHOD = Cache(
    paper="Liu et al. 2024, arXiv 2402.02750",
    options=Options,
    needs=(),
    covers={"kivi": [{"method": "kivi", "target": {"bits": 2}}]},
    baseline="kv-rtn",
    codec=codec,
)
