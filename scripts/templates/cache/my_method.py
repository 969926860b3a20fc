"""replace: one line that says what my-method does. Now: values have one bit more than keys.

replace: the equations. Keys k and values v of a token and head are rounded in groups, q_b(k) and q_(b+1)(v).

Paper: replace: authors, year, arXiv number.
Cost: replace: b + 1/2 bits for each element, and scales. Limits: replace: keys are rounded by token.
"""

from __future__ import annotations

from pydantic import Field

from lilliput.runtime.caches.codec import CodecSpec
from lilliput.runtime.caches.per_token import PerTokenSpec
from lilliput.verbs.cache import Cache
from lilliput.verbs.cache import Options as Common


class Options(Common):
    """replace: your options, each with a default and a description."""

    more: int = Field(1, ge=0, le=4, description="bits that values have more than keys")


def codec(bits: int, group: int, o: Options, turned: bool) -> CodecSpec:
    """How keys and values are stored: a codec of `lilliput.runtime.caches`, to which a kind of your own is added."""
    # replace: from here on
    return PerTokenSpec(bits, bits + o.more, group)


METHOD = Cache(
    paper="replace: authors, year, arXiv number",
    options=Options,
    needs=(),
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    codec=codec,
)
