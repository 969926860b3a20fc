"""Adapters in front of the text: prefixes of keys and values in every block, or embeddings before the first token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import LilliputError
from lilliput.training.borrowed import Borrowed


def _alone(positions: Tensor | None, cache: Any) -> None:
    """Raises LilliputError for text or models that leave no room in front."""
    if positions is not None:
        raise LilliputError(
            "rows that hold several documents cannot have one prefix each: take text without documents (documents: "
            "false, and no chats)"
        )
    if cache is not None:
        raise RuntimeError("a prefix beside a compressed cache, which the plan should have refused")


class Prefixed(Borrowed):
    """Keys and values in front of those of the text, in every block."""

    def read(self, skeleton: Skeleton, ids: Tensor, positions: Tensor | None, cache: Any) -> Tensor:
        _alone(positions, cache)
        return skeleton.read(ids, cache=held(self.inner.get_prompt(len(ids))))


def held(cache: Any) -> Any:
    """A cache with the keys and values of another one, to which no call adds: blocks may run again on the way back."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Held(DynamicLayer):  # type: ignore[misc]
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)

    out = DynamicCache()
    for layer in cache.layers:
        own = Held()
        own.lazy_initialization(layer.keys, layer.values)
        own.keys, own.values = layer.keys, layer.values
        out.layers.append(own)
    return out


class Prompted(Borrowed):
    """Embeddings of virtual tokens in front of those of the text; the text's hidden states are what is shown."""

    def read(self, skeleton: Skeleton, ids: Tensor, positions: Tensor | None, cache: Any) -> Tensor:
        _alone(positions, cache)
        own = self.inner.get_prompt(len(ids))
        count = own.shape[1]
        table: nn.Module = skeleton.model.get_input_embeddings()  # type: ignore[operator]

        def put(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return torch.cat([own.to(out.dtype), out[:, count:]], 1)

        handle = table.register_forward_hook(put)
        try:
            return skeleton.read(torch.cat([ids.new_zeros(len(ids), count), ids], 1))[:, count:]
        finally:
            handle.remove()
