"""The hook before an attention that gives it a compressed cache layer, and what the layer has to know of each call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lilliput.anatomy.cached import INNER, NAMES, argument
from lilliput.errors import LilliputError, SourceError
from lilliput.runtime.caches.codec import CacheCodec, Incoming
from lilliput.runtime.caches.turns import ARGUMENT, Rotate, Table, Turn

MASK = "attention_mask"
_TABLE = "lilliput_turns"


@dataclass
class Caches:
    """The compressed caches of one model: whether new ones are made, its blocks that have one, and what makes a codec,
    by the number of the layer."""

    blocks: tuple[str, ...] = ()
    active: bool = True
    handles: list[RemovableHandle] = field(default_factory=list)
    makers: dict[int, Callable[[], CacheCodec]] = field(default_factory=dict)


def attention_of(block: nn.Module) -> str:
    """The name, within a block, of its attention that takes a cache. Raises SourceError where there is not just one."""
    found: list[str] = [
        name
        for name, x in block.named_modules()
        if name and isinstance(getattr(x, "layer_idx", None), int) and argument(x.forward, (*NAMES, *INNER)) is not None
    ]
    if len(found) != 1:
        raise SourceError(
            f"{type(block).__name__} has {len(found)} attentions that take a cache of transformers, and not one"
        )
    return found[0]


def watch(
    attention: nn.Module, state: Caches, make: Callable[[], CacheCodec], rotate: Rotate | None
) -> RemovableHandle:
    """Let an attention put what `make` gives in place of the empty layer of any cache that it is called with."""
    names = tuple(inspect.signature(attention.forward).parameters)
    number: int = attention.layer_idx  # type: ignore[assignment]
    state.makers[number] = make

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = dict(zip(names, args, strict=False)) | kwargs
        cache = next((named[x] for x in (*NAMES, *INNER) if named.get(x) is not None), None)
        if cache is None:
            return None
        layer = _layer(cache, number, type(module).__name__, make if state.active else None)
        if layer is None:
            return None
        mask: Tensor | None = named.get(MASK)
        turned = named.get(ARGUMENT)
        turn = None
        if rotate is not None and turned is not None:
            table = cache.__dict__.setdefault(_TABLE, Table())
            turn = Turn(turned[0], turned[1], table, rotate)
        layer.incoming = Incoming(turn, _real(mask) if layer.codec.pads else None)
        hidden: Tensor = named["hidden_states"] if "hidden_states" in named else args[0]
        places = layer.places(hidden.shape[1])
        if places is None or mask is None:
            return None
        mask = mask.expand(len(places), -1, -1, -1)
        index = places[:, None, None].expand(-1, *mask.shape[1:3], -1).to(mask.device)
        return _replaced(names, args, kwargs, mask.gather(3, index))

    return attention.register_forward_pre_hook(hook, with_kwargs=True)


def _replaced(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor) -> Any:
    place = names.index(MASK)
    if place < len(args):
        return (*args[:place], mask, *args[place + 1 :]), dict(kwargs)
    return args, {**kwargs, MASK: mask}


def _real(mask: Tensor | None) -> Tensor | None:
    """bool [batch, tokens so far]: what the last token of the call may attend to."""
    if mask is None:
        return None
    if mask.dim() != 4:
        raise LilliputError(
            f"a compressed cache knows no attention mask of the shape {list(mask.shape)}: load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last == 0


def _layer(cache: Any, number: int, owner: str, make: Callable[[], CacheCodec] | None) -> Any:
    """The compressed layer of a cache, made if it is still empty; None where none is wanted."""
    from transformers.cache_utils import DynamicLayer

    from lilliput.runtime.caches.layer import CompressedLayer

    layers = getattr(cache, "layers", None)
    if layers is None:
        raise LilliputError(
            f"the folder stores keys and values compressed, which a {type(cache).__name__} cannot: leave the cache to "
            "transformers"
        )
    while make is not None and len(layers) <= number:
        layers.append(DynamicLayer())
    layer: Any = layers[number] if number < len(layers) else None
    if isinstance(layer, CompressedLayer):
        return layer
    if make is None:
        return None
    if type(layer) is not DynamicLayer:
        raise LilliputError(
            f"layer {number} ({owner}) stores its keys and values compressed, which a {type(layer).__name__} of "
            "transformers cannot: leave `cache_implementation` out"
        )
    if layer.get_seq_length() > 0:
        raise LilliputError(
            f"the cache of layer {number} ({owner}) holds tokens that were not compressed: begin with an empty one"
        )
    layers[number] = CompressedLayer(make())
    return layers[number]
