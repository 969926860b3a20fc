"""How a model is given what it keeps of the tokens before: releases of transformers and architectures differ."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from lilliput.errors import SourceError

# `cache` from transformers 5.24 on, but XLM has had an argument of that name for something else all along: it counts
# only where none of the other names is there, and only if outputs have it too.
NAMES = ("past_key_values", "cache_params", "cache")
INNER = ("layer_past",)  # further names by which attentions take it


def argument(forward: Any, names: Sequence[str] = NAMES) -> str | None:
    """The name under which a forward pass takes a cache; None where it takes none."""
    accepted = inspect.signature(forward).parameters
    return next((name for name in names if name in accepted), None)


def options(model: Any, cache: Any) -> dict[str, Any]:
    """What a model is called with to read with this cache; None: without any. Raises SourceError for a model that
    takes none."""
    if cache is None:
        return {"use_cache": False}
    name = argument(model.forward)
    if name is None:
        raise SourceError(f"{type(model).__name__} takes no cache of the tokens before")
    return {"use_cache": True, name: cache}


def filled(config: Any, batch: int, tokens: int, device: str = "cpu") -> Any:
    """A cache of transformers that has seen so many tokens; what they were is nothing."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    if tokens:
        nothing = torch.zeros(batch, 1, tokens, 1, device=device)
        for number, layer in enumerate(cache.layers):
            if hasattr(layer, "update"):  # states that do not grow have no length
                cache.update(nothing, nothing, number)
    return cache


def kinds(config: Any) -> tuple[str, ...]:
    """By block, the name of the layer that transformers' own cache has for it."""
    from transformers import DynamicCache

    return tuple(type(layer).__name__ for layer in DynamicCache(config=config).layers)


PLAIN = "DynamicLayer"  # of `kinds`: all tokens are kept, and no other layer reads them
