"""The steps of a forward pass: tokens to the first block, through a loaded block, and on to the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lilliput.anatomy.calls import Calls
from lilliput.anatomy.skeleton import Skeleton
from lilliput.machine import memory
from lilliput.model.weights import Model
from lilliput.streaming.states import Activations


@dataclass(frozen=True)
class Batches:
    """Calibration samples cut into forward passes, with the block arguments recorded for each shape."""

    bounds: tuple[tuple[int, int], ...]
    calls: Mapping[int, Calls]  # by number of samples


def embed(model: Model, ids: Tensor, batch: int, into: Activations | None) -> Batches:
    """Embed ids [N, T] batch by batch into `into` (None: only record the arguments that the blocks are called with)."""
    skeleton = model.skeleton
    bounds = tuple((a, min(a + batch, len(ids))) for a in range(0, len(ids), batch))
    calls: dict[int, Calls] = {}
    with _embeddings(model, ids) as mapped:
        for start, stop in bounds:
            if into is None and stop - start in calls:
                continue
            hidden, recorded = skeleton.embed(mapped[start:stop].to(skeleton.device))
            calls.setdefault(stop - start, recorded)
            if into is not None:
                into.write(start, hidden)
    memory.trim()
    return Batches(bounds, calls)


@contextmanager
def _embeddings(model: Model, ids: Tensor) -> Iterator[Tensor]:
    """The embeddings in place while the context lasts, of the token table only the rows that `ids` [N, T] name.

    Gives ids renumbered to those rows: a vocabulary of 128,000 would otherwise be the largest thing in memory.
    """
    skeleton = model.skeleton
    table: Any = cast(Any, skeleton.model).get_input_embeddings()
    name = next((n for n in skeleton.embeddings if skeleton.tensor(n) is getattr(table, "weight", None)), None)
    if name is None or not isinstance(table, nn.Embedding):
        model.load(skeleton.embeddings)
        try:
            yield ids
        finally:
            model.unload(skeleton.embeddings)
        return
    used, mapped = ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    rows = torch.empty(len(used), table.weight.shape[1], dtype=skeleton.dtype_of(name), device=skeleton.device)
    for first, last in model.spans(name, used):
        inside = (used >= first) & (used < last)
        rows[inside] = model.read_rows(name, first, last)[used[inside] - first].to(rows)
    padding, table.padding_idx = table.padding_idx, None
    others = [n for n in skeleton.embeddings if n != name]
    model.load(others)
    whole = table.weight
    try:
        table.weight = nn.Parameter(rows, requires_grad=False)
        yield mapped
    finally:
        table.weight = whole
        table.padding_idx = padding
        model.unload(others)


def through(
    skeleton: Skeleton, block: int, batches: Batches, inputs: Activations, outputs: Activations | None
) -> list[Callable[[], None]]:
    """One forward pass of a loaded block for each batch, to be run in this order; without `outputs` nothing is kept."""

    def one(start: int, stop: int) -> Callable[[], None]:
        def run() -> None:
            hidden = skeleton.run(block, inputs.read(start, stop).to(skeleton.device), batches.calls[stop - start])
            if outputs is not None:
                outputs.write(start, hidden)

        return run

    return [one(a, b) for a, b in batches.bounds]


def finish(model: Model, *streams: Activations) -> None:
    """Turn hidden states [N, T, H] after the last block into what the head reads, in their files."""
    skeleton = model.skeleton
    model.load(skeleton.final)
    try:
        with torch.no_grad():
            for states in streams:
                for i in range(len(states)):
                    states.write(i, skeleton.finish(states.read(i, i + 1).to(skeleton.device)))
    finally:
        model.unload(skeleton.final)
