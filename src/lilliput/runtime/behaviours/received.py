"""Attention received: how much the queries of a prompt look at each of its tokens, from a layer's own queries and keys.

transformers hands the queries and keys of a layer, rotated and normalized as the model does it, to a function that its
config names. For one call that is `NAME`, which sums the attention and then calls the function that was meant.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import LilliputError, SourceError

NAME = "lilliput_received"
ROOM = 1 << 24  # attention weights in memory at a time, of all heads and of a few queries
RUNS = ("eager", "sdpa")


def received(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    prompt: int,
    softcap: float | None = None,
    room: int = ROOM,
) -> Tensor:
    """a_j = mean over heads and prompt queries i of softmax_j(q_i k_j scaling), float32 [batch, prompt].

    query [batch, heads, tokens, d], key [batch, groups, tokens, d], of which the first `prompt` tokens count; mask:
    bool or added, [.., tokens, tokens], None for a causal one. At most `room` attention weights are held at once.
    """
    batch, heads, _, width = query.shape
    groups = key.shape[1]
    keys = key[:, :, None, :prompt].float()
    places = torch.arange(prompt, device=query.device)
    total = torch.zeros(batch, prompt, dtype=torch.float32, device=query.device)
    step = max(1, room // (batch * heads * prompt))
    for start in range(0, prompt, step):
        stop = min(prompt, start + step)
        rows = query[:, :, start:stop].reshape(batch, groups, heads // groups, stop - start, width).float()
        scores = rows @ keys.transpose(-1, -2) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is None:
            scores = scores.masked_fill(places > places[start:stop, None], -torch.inf)
        else:
            part = mask[..., start:stop, :prompt].unsqueeze(2)
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.float()
        total += scores.softmax(-1).sum((1, 2, 3))
    return total / (heads * prompt)


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention of a decoder layer whose queries and keys can be seen. Raises SourceError where there is none, or
    where it sees only a window."""
    found = [
        x
        for x in layer.modules()
        if hasattr(x, "config")
        and hasattr(x, "layer_idx")
        and hasattr(sys.modules.get(_home(x)), "eager_attention_forward")
    ]
    if len(found) != 1:
        raise SourceError(
            f"token pruning needs layers with one attention that goes through transformers' attention functions, and "
            f"{type(layer).__name__} has {len(found)}: leave token-pruning out for this model"
        )
    window = getattr(found[0], "sliding_window", None)
    if not hasattr(found[0], "sliding_window"):
        window = getattr(found[0].config, "sliding_window", None)
    if window is not None:
        raise SourceError(
            f"token pruning needs full attention, and {type(layer).__name__} sees a window of {window} tokens: leave "
            "token-pruning out for this model"
        )
    return found[0]


def _home(module: nn.Module) -> str:
    return next((x.__module__ for x in type(module).__mro__ if x.__module__.startswith("transformers.models.")), "")


@contextmanager
def watched(attention: nn.Module, prompt: int) -> Iterator[list[Tensor]]:
    """While the context lasts, the attention that the first `prompt` tokens receive is added to the list."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _watch)
    config: Any = attention.config
    implementation = config._attn_implementation
    if implementation not in RUNS:
        raise LilliputError(
            f"token pruning runs with the attention functions {' and '.join(RUNS)}, and this model was loaded with "
            f"'{implementation}': load it with attn_implementation='sdpa'"
        )
    seen = copy.copy(config)
    seen._attn_implementation_internal = NAME
    found: list[Tensor] = []
    attention.__dict__["received"] = found, prompt, implementation
    attention.config = seen
    try:
        yield found
    finally:
        attention.config = config
        del attention.__dict__["received"]


def _watch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found, prompt, implementation = module.__dict__["received"]
    odd = [x for x in ("sliding_window", "s_aux", "position_bias") if options.get(x) is not None]
    if odd:
        raise LilliputError(f"token pruning knows no attention with '{odd[0]}': use a model with full attention")
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    found.append(received(query, key, attention_mask, scaling, prompt, options.get("softcap")))
    plain = sys.modules[_home(module)].eager_attention_forward
    function = plain if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    return function(module, query, key, value, attention_mask, **options)
