"""What a model shows while it reads: hidden states, attention and values, of all blocks or of the last one.

Hidden states come from hooks on the blocks. transformers hands rotated queries, keys and values of a layer to a
function that its config names; while the model is watched that is `NAME`, which notes what was asked for and calls the
function that was meant, so that outputs are what they were.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy.calls import take_hidden
from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import SourceError
from lilliput.verbs.objective import Seen

NAME = "lilliput_watched"
ATTENTION = frozenset({"attention", "scores", "values"})


@dataclass
class _Noted:
    """What one pass has shown so far, by block."""

    fields: frozenset[str]
    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def seen(self) -> Seen:
        def listed(found: dict[int, Tensor]) -> tuple[Tensor, ...]:
            return tuple(found[n] for n in sorted(found))

        return Seen(listed(self.hidden), listed(self.attention), listed(self.scores), listed(self.values))


@contextmanager
def watching(skeleton: Skeleton, fields: frozenset[str], last: bool = False) -> Iterator[Callable[[], Seen]]:
    """While the context lasts, what the model shows of what it reads; the function gives that of the last pass.

    last: of the last block alone. Raises SourceError for attention that does not go through transformers' functions.
    """
    noted = _Noted(fields)
    count = len(skeleton.block_names)
    with ExitStack() as stack:
        for n in range(count - 1 if last else 0, count):
            layer = skeleton.block(n)
            if "hidden" in fields:
                if n == 0:
                    stack.callback(layer.register_forward_pre_hook(_before(noted), with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(_after(noted, n + 1)).remove)
            if fields & ATTENTION:
                stack.enter_context(_attended(attention_of(layer), noted, n))
        yield noted.seen


def check(skeleton: Skeleton, fields: frozenset[str]) -> None:
    """Raises SourceError where a model does not show these fields."""
    if fields & ATTENTION:
        for n in range(len(skeleton.block_names)):
            _implementation(attention_of(skeleton.block(n)))


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention of a block. Raises SourceError where there is none that can be seen, or more than one."""
    found = [
        x
        for x in layer.modules()
        if hasattr(x, "config") and hasattr(x, "layer_idx") and hasattr(_home(x), "eager_attention_forward")
    ]
    if len(found) != 1:
        raise SourceError(
            f"{type(layer).__name__} has {len(found)} attentions that go through transformers' attention functions, "
            "and an objective that compares attention needs one: compare hidden states, with feature-kd"
        )
    return found[0]


def _home(module: nn.Module) -> Any:
    names = (x.__module__ for x in type(module).__mro__ if x.__module__.startswith("transformers.models."))
    return sys.modules.get(next(names, ""))


def _implementation(attention: nn.Module) -> str:
    config: Any = attention.config
    name = str(config._attn_implementation)
    if name not in ("eager", "sdpa", NAME):
        raise SourceError(
            f"{type(attention).__name__} attends by '{name}', which shows nothing: only eager and sdpa can be watched"
        )
    return name


def _before(noted: _Noted) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        noted.hidden[0] = take_hidden(args, kwargs)[0]

    return hook


def _after(noted: _Noted, place: int) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, out: Any) -> None:
        noted.hidden[place] = out if isinstance(out, Tensor) else out[0]

    return hook


@contextmanager
def _attended(attention: nn.Module, noted: _Noted, block: int) -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _watch)
    config: Any = attention.config
    implementation = _implementation(attention)
    seen = copy.copy(config)
    seen._attn_implementation_internal = NAME
    attention.__dict__["watched"] = noted, block, implementation
    attention.config = seen
    try:
        yield
    finally:
        attention.config = config
        del attention.__dict__["watched"]


def _watch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    noted, block, implementation = module.__dict__["watched"]
    odd = [x for x in ("s_aux", "position_bias") if options.get(x) is not None]
    if odd:
        raise SourceError(
            f"{type(module).__name__} attends with '{odd[0]}', which is not compared: compare hidden states, with "
            "feature-kd"
        )
    if "values" in noted.fields:
        noted.values[block] = value
    if noted.fields & {"attention", "scores"}:
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = attention_scores(query, key, attention_mask, scaling, options.get("softcap"))
        if "scores" in noted.fields:
            noted.scores[block] = scores
        if "attention" in noted.fields:
            noted.attention[block] = scores.softmax(-1)
    plain = _home(module).eager_attention_forward
    function = plain if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    return function(module, query, key, value, attention_mask, **options)


def attention_scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """float32 [batch, heads, T, T] of query [batch, heads, T, d] and key [batch, groups, T, d], -inf where nothing is
    seen; mask: bool or added, [.., T, T], None for a causal one."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.float() @ key.float().transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        tokens = torch.arange(scores.shape[-1], device=scores.device)
        return scores.masked_fill(tokens > tokens[:, None], -torch.inf)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return (scores + mask.float()).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)
