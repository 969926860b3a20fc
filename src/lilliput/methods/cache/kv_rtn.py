"""Plain rounding of the cache: keys and values of each token and head by themselves, as soon as they come.

A vector x of one token and head is cut into groups of `group_size` neighbouring channels, and each is rounded to b bits
between its own least and greatest value,

    code = round((x - m) / s),    s = (max x - m) / (2^b - 1),    m = min x,    x ~ s code + m,

s and m in float16. With `rotate` the vector is multiplied by the Hadamard matrix of a head's width before and by its
transpose after, which spreads single large channels over all of them. What a token attends to is what is stored, its
own key and value included, so that a text gives the same figures however it is cut into calls.

Paper: the usual baseline; per-token caches as in Sheng et al. 2023 (FlexGen), arXiv 2303.06865; the rotation as in
Ashkboos et al. 2024 (QuaRot), arXiv 2404.00456. Cost: b + 32 / group_size bits for each element; the cache is decoded
for every call. Limits: keys have large channels that groups of a token cannot follow: below 4 bits use kivi.
"""

from __future__ import annotations

from pydantic import Field

from lilliput.runtime.caches.codec import CodecSpec
from lilliput.runtime.caches.per_token import PerTokenSpec
from lilliput.verbs.cache import Cache
from lilliput.verbs.cache import Options as Common


class Options(Common):
    """See the module's docstring."""

    value_bits: int | None = Field(None, ge=2, le=16, description="bits of values, 16: as they are; none: as of keys")
    rotate: bool = Field(False, description="round behind a Hadamard transform of each head")


def codec(bits: int, group: int, o: Options, turned: bool) -> CodecSpec:
    """How keys and values are stored."""
    return PerTokenSpec(bits, o.value_bits or bits, group, o.rotate)


METHOD = Cache(
    paper="Sheng et al. 2023, arXiv 2303.06865; Ashkboos et al. 2024, arXiv 2404.00456",
    options=Options,
    needs=(),
    covers={"kv-rtn": [{"method": "kv-rtn"}]},
    codec=codec,
    trainable=True,
)
