"""How much each residual branch of a block, attention and MLP, adds to the stream that it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lilliput.anatomy.model import Block
from lilliput.anatomy.skeleton import Skeleton
from lilliput.model.edit import BRANCHES, writers_of
from lilliput.streaming.forward import Batches
from lilliput.streaming.states import Activations

_LEAST = 1e-30  # of a norm that something is divided by


def added(
    skeleton: Skeleton, number: int, block: Block, batches: Batches, inputs: Activations, outputs: Activations
) -> Mapping[str, float]:
    """By branch that the loaded block has, the mean over tokens of |what it adds| / |what it is added to|.

    What the block gives without its MLP is the stream to which the MLP adds, and what that adds to the block's inputs
    is the attention's, whatever norms there are; where both read the inputs, both are over these plus the attention's.
    """
    found = [x for x in BRANCHES if writers_of(block, x)]
    totals, tokens = dict.fromkeys(found, 0.0), 0
    with torch.no_grad(), _silenced(skeleton, number, block, "mlp"):
        for a, b in batches.bounds:
            before = inputs.read(a, b).to(skeleton.device)
            between = skeleton.run(number, before, batches.calls[b - a]).float()
            before, after = before.float(), outputs.read(a, b).to(skeleton.device).float()
            tokens += before.shape[0] * before.shape[1]
            for branch, change, base in (("attention", between - before, before), ("mlp", after - between, between)):
                if branch in totals:
                    totals[branch] += float(_ratio(change, base).sum(dtype=torch.float64))
    return {branch: total / max(tokens, 1) for branch, total in totals.items()}


def _ratio(change: Tensor, base: Tensor) -> Tensor:
    ratio: Tensor = change.norm(dim=-1) / base.norm(dim=-1).clamp(min=_LEAST)
    return ratio


@contextmanager
def _silenced(skeleton: Skeleton, number: int, block: Block, branch: str) -> Iterator[None]:
    """A loaded block whose branch writes nothing while the context lasts."""
    tensors: list[Any] = []
    for name in writers_of(block, branch):
        module = skeleton.block(number).get_submodule(name)
        tensors += [x for x in (module.weight, getattr(module, "bias", None)) if x is not None]
    kept = [x.detach().clone() for x in tensors]
    try:
        for x in tensors:
            x.data.zero_()
        yield
    finally:
        for x, value in zip(tensors, kept, strict=True):
            x.data.copy_(value)
