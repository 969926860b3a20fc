"""Prefix tuning: in every block the text sees n pairs of keys and values before its first token, which are trained.

While it is trained, the prefix is made by a small network from n vectors, P = W2 tanh(W1 e), which makes training
steadier; what is written are the keys and values themselves.

Paper: Li and Liang 2021, arXiv 2101.00190. Made with peft. Cost: 2 n hidden numbers a block when it is used, and the
network while it is trained; n more positions for every text. Limits: attentions that keep all keys and values, text in
one piece, no compressed cache; the model does not begin at what it was.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lilliput.anatomy import cached
from lilliput.target import Target
from lilliput.training import borrowed
from lilliput.training.prompted import Prefixed
from lilliput.verbs.adapt import Adapt, Adapter, AdapterOptions, AdaptIO


class Options(AdapterOptions):
    """See the module's docstring."""

    length: int = Field(16, ge=1, description="n, pairs of keys and values in front of the text")
    network: int | None = Field(
        None, ge=1, description="width of the network that makes them while they are trained; none: the model's"
    )
    direct: bool = Field(False, description="without the network: keys and values themselves are trained")


def attach(io: AdaptIO, target: Target, o: Options) -> Adapter:
    """A random prefix."""
    config = borrowed.peft().PrefixTuningConfig(
        num_virtual_tokens=o.length,
        prefix_projection=not o.direct,
        encoder_hidden_size=o.network or io.skeleton.hidden_size,
        task_type="CAUSAL_LM",
    )
    return Prefixed(borrowed.wrapped(io.skeleton.model, config))


def fixed(hidden: int, blocks: int, o: Options) -> int:
    """The prefix, and the network that makes it."""
    if o.direct:
        return 2 * o.length * blocks * hidden
    wide = o.network or hidden
    return (o.length + wide) * hidden + wide + (wide + 1) * 2 * blocks * hidden


def refuses(config: Any, o: Options) -> str | None:
    """Blocks that keep something else than all keys and values have no room for a prefix."""
    odd = [x for x in cached.kinds(config) if x != cached.PLAIN]
    if odd:
        return f"the model keeps a {odd[0]} in some blocks, which has no room for a prefix: take `prompt-tuning`"
    return None


METHOD = Adapt(
    paper="Li and Liang 2021, arXiv 2101.00190",
    options=Options,
    covers={"prefix-tuning": [{"method": "prefix-tuning"}]},
    attach=attach,
    fixed=fixed,
    refuses=refuses,
    adds=lambda o: o.length,
    covering=False,
)
