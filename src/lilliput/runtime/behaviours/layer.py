"""A decoder layer through which only some tokens of a prompt go: the others have left after an earlier one.

Between layers a token that has left is a row of NaN, so that it is known from the hidden states alone, wherever they
lie meanwhile; the last layer makes zeros of them. Queries, keys, values and positions are those of the tokens present,
in their order.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import LilliputError
from lilliput.runtime.behaviours.received import attention_of, watched
from lilliput.runtime.behaviours.state import Behaviours

KEPT = "lilliput_kept"  # of a cache: by layer, the prompt's positions that it keeps, and the prompt's length
_TOKENWISE = ("position_ids", "cache_position")


class BehavingLayer(nn.Module):
    """Mixed in before a decoder layer's own class by `behave_`."""

    behaviours: Behaviours
    number: int
    weights: int  # of its linears
    names: tuple[str, ...]  # of the arguments of its forward pass

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state, number = self.behaviours, self.number
        if not state.active:
            return super().forward(*args, **kwargs)
        kwargs |= zip(self.names[1:], args[1:], strict=False)  # some models pass the cache by its place
        args = args[:1]
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        batch, tokens = hidden.shape[:2]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        decoding = cache is not None and int(cache.get_seq_length(number)) > 0
        if state.rule is None or decoding:
            state.work.tokens(self.weights, batch * tokens, batch * tokens)
            return super().forward(*args, **(_later(kwargs, cache, number, tokens) if decoding else kwargs))
        if state.strict and state.prompt is None:
            raise LilliputError(
                "the folder prunes the tokens of prompts, and here whole texts are read, of which nobody says what is "
                "the prompt: measure it with `lilliput eval`, or generate with it"
            )
        prompt = tokens if state.prompt is None else min(state.prompt, tokens)
        entering = state.rule.entering(number, prompt)
        leaving = state.rule.leaving(entering) if number in state.rule.layers else entering
        state.work.tokens(self.weights, batch * tokens, batch * (entering + tokens - prompt))
        if leaving == prompt:
            return super().forward(*args, **kwargs)
        _refuse(kwargs, cache, tokens)
        places = torch.arange(tokens, device=hidden.device).expand(batch, -1)
        if entering < prompt:
            places = _present(hidden, entering + tokens - prompt)
            args, kwargs = _gathered(hidden, places, args, kwargs)
        if leaving < entering:
            with watched(attention_of(self), entering) as found:
                out = super().forward(*args, **kwargs)
            if len(found) != 1:
                raise LilliputError(f"{type(self).__name__} called its attention {len(found)} times, and not once")
            kept = chosen(found[0], leaving, places.shape[1])
        else:
            out, kept = super().forward(*args, **kwargs), None
        if cache is not None and entering < prompt:
            setattr(cache, KEPT, (getattr(cache, KEPT, None) or {}) | {number: (places, tokens)})
        first: Tensor = out if isinstance(out, Tensor) else out[0]
        if kept is not None:
            first, places = _rows(first, kept), places.gather(1, kept)
        fill = 0.0 if number + 1 == len(state.blocks) else torch.nan
        whole = first.new_full((batch, tokens, first.shape[-1]), fill)
        whole.scatter_(1, places[..., None].expand_as(first), first)
        return whole if isinstance(out, Tensor) else (whole, *out[1:])


def chosen(importance: Tensor, count: int, tokens: int) -> Tensor:
    """Which of `tokens` go on, int64 [batch, ..], ascending: of the prompt's, importance [batch, n], the `count`
    largest and always the last, and all that follow. Of equals the earlier ones stay."""
    prompt = importance.shape[1]
    importance = importance.clone()
    importance[:, -1] = torch.inf
    order = importance.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
    rest = torch.arange(prompt, tokens, device=order.device).expand(len(order), -1)
    return torch.cat([order, rest], dim=1)


def _present(hidden: Tensor, expected: int) -> Tensor:
    """The positions of the tokens that have not left, int64 [batch, expected]."""
    here = ~hidden.isnan().all(-1)
    if bool((here.sum(1) != expected).any()):
        raise LilliputError(
            f"{int(here.sum(1).min())} tokens have finite hidden states, where token pruning has left {expected}: a "
            "weight is damaged or the computation overflows; try float32, or check the folder with `lilliput verify`"
        )
    return here.nonzero()[:, 1].view(len(hidden), expected)


def _refuse(kwargs: dict[str, Any], cache: Any, tokens: int) -> None:
    """Raises LilliputError for what a prompt cannot be pruned with."""
    mask = kwargs.get("attention_mask")
    if mask is not None:
        if mask.dim() != 4 or mask.shape[-2:] != (tokens, tokens):
            raise LilliputError(
                f"token pruning knows no attention mask of the shape {list(mask.shape)}: give prompts without one"
            )
        last = mask[:, :, -1]
        if not bool((last if last.dtype == torch.bool else last == 0).all()):
            raise LilliputError(
                "token pruning counts every token of a prompt, and these are padded: run prompts of one length, or one "
                "at a time"
            )
    if cache is not None and getattr(cache, "is_compileable", False):
        raise LilliputError("token pruning needs a cache whose layers grow on their own: leave the static cache out")


def _gathered(hidden: Tensor, at: Tensor, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a layer for some of the tokens, at [batch, present]."""
    present = at.shape[1]
    changed = dict(kwargs)
    if (mask := kwargs.get("attention_mask")) is not None:
        mask = mask.expand(len(at), -1, -1, -1)
        mask = mask.gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        changed["attention_mask"] = mask.gather(3, at[:, None, None].expand(-1, mask.shape[1], present, -1))
    if (turned := kwargs.get("position_embeddings")) is not None:
        changed["position_embeddings"] = tuple(_rows(x.expand(len(at), -1, -1), at) for x in turned)
    for name in _TOKENWISE:
        if (ids := kwargs.get(name)) is not None:
            changed[name] = ids[:present] if ids.dim() == 1 else ids.expand(len(at), -1).gather(1, at)
    if args:
        return (_rows(hidden, at), *args[1:]), changed
    return args, changed | {"hidden_states": _rows(hidden, at)}


def _later(kwargs: dict[str, Any], cache: Any, number: int, tokens: int) -> dict[str, Any]:
    """The arguments for `tokens` that follow a prompt: a mask has the columns of the keys that the layer has kept."""
    kept = (getattr(cache, KEPT, None) or {}).get(number)
    if kept is None:
        return kwargs
    places, prompt = kept
    # The first layer has kept the whole prompt, and has seen these tokens already.
    later = cache.get_seq_length(number) - places.shape[1]
    if later < 0 or cache.get_seq_length(0) - prompt != later + tokens:
        raise LilliputError(
            "the cache of a pruned prompt was cut, and its layers have not lost the same tokens: read the prompt again"
        )
    mask = kwargs.get("attention_mask")
    if mask is None:
        return kwargs
    rest = torch.arange(prompt, mask.shape[-1], device=places.device).expand(len(places), -1)
    columns = torch.cat([places, rest], dim=1)
    mask = mask.expand(len(columns), -1, -1, -1)
    return kwargs | {"attention_mask": mask.gather(3, columns[:, None, None].expand(-1, *mask.shape[1:3], -1))}


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """Rows `at` [batch, n] of x [batch, tokens, width]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def behave_(layer: nn.Module, state: Behaviours, number: int) -> None:
    """Let a decoder layer, block `number`, follow the rules of `state`, in place. Raises SourceError where it cannot
    prune tokens as they ask."""
    if state.rule is not None:
        attention_of(layer)
    layer.__dict__["names"] = tuple(inspect.signature(layer.forward).parameters)
    layer.__class__ = _subclass(type(layer))  # type: ignore[arg-type]
    layer.behaviours, layer.number = state, number  # type: ignore[assignment]
    layer.weights = sum(_weights(x) for x in layer.modules())  # type: ignore[assignment]


def _weights(module: nn.Module) -> int:
    from transformers.pytorch_utils import Conv1D  # not where methods are only listed

    if isinstance(module, nn.Linear):
        return module.out_features * module.in_features
    return int(module.nf * module.nx) if isinstance(module, Conv1D) else 0


@functools.cache
def _subclass(kind: type) -> type:
    return type(f"Behaving{kind.__name__}", (BehavingLayer, kind), {"__module__": kind.__module__})
