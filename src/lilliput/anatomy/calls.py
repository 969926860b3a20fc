"""What the blocks of a model are called with beside their hidden states, as its own forward pass says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """What one decoder layer was called with, its hidden states left out (they were an argument of name `keyword`)."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: str | None

    def with_cache(self, recorded: Any, cache: Any) -> Call:
        """The same call with another cache than the recorded one."""
        if recorded is None:
            return self
        args = tuple(cache if x is recorded else x for x in self.args)
        kwargs = {name: cache if x is recorded else x for name, x in self.kwargs.items()}
        return Call(args, kwargs, self.keyword)


@dataclass(frozen=True)
class Calls:
    """The recorded arguments of every block for inputs of `shape` (batch, tokens): masks, positions, rotations; cache:
    the one among them, which holds nothing of use."""

    shape: tuple[int, int]
    layers: tuple[Call, ...]
    cache: Any = None


def take_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states among the arguments of a layer, and the rest."""
    if args:
        return args[0], Call(args[1:], dict(kwargs), None)
    key = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return kwargs[key], Call((), {k: v for k, v in kwargs.items() if k != key}, key)


def same(a: Any, b: Any) -> bool:
    """Whether two recorded arguments are equal, tensors by value."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b)
