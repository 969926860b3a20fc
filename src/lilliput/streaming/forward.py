"""Forward passes over a model, one block resident: hidden states between blocks, and what its sites see on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lilliput.anatomy.model import Site
from lilliput.anatomy.skeleton import Calls
from lilliput.machine import memory
from lilliput.model.stored import Model
from lilliput.progress import Progress
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.streaming import lockstep
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
        here = (used >= first) & (used < last)
        rows[here] = model.read_rows(name, first, last)[used[here] - first].to(rows)
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
    model: Model, index: int, batches: Batches, inputs: Activations, outputs: Activations | None
) -> list[Callable[[], None]]:
    """One forward pass of a loaded block for each batch, to be run in this order; without `outputs` nothing is kept."""
    skeleton = model.skeleton

    def one(start: int, stop: int) -> Callable[[], None]:
        def run() -> None:
            hidden = skeleton.run(index, inputs.read(start, stop).to(skeleton.device), batches.calls[stop - start])
            if outputs is not None:
                outputs.write(start, hidden)

        return run

    return [one(a, b) for a, b in batches.bounds]


def observe(
    model: Model,
    index: int,
    batches: Batches,
    inputs: Activations,
    outputs: Activations,
    sites: Sequence[Site] = (),
    needs: frozenset[str] = frozenset(),
) -> dict[str, SiteStats]:
    """Run a loaded block over all samples, from `inputs` to `outputs` (which may be the same file).

    Returns the statistics `needs` of the inputs of `sites`, by site name.
    """
    skeleton = model.skeleton
    states = {site.name: fold.init(site.width, needs, skeleton.device) for site in sites}
    runs = through(model, index, batches, inputs, outputs)
    taps = [lockstep.Tap(s.name, skeleton.block(index).get_submodule(s.linears[0])) for s in sites if needs]

    def see(site: str, x: Tensor) -> None:
        states[site] = fold.update(states[site], x)

    lockstep.watch(taps, runs, see, stop_after=False)
    block = skeleton.block_names[index]
    return {name: fold.complete(state, f"{block}.{name}", skeleton.dtype) for name, state in states.items()}


def last_hidden(
    model: Model,
    ids: Tensor,
    folder: Path,
    *,
    batch: int = 2,
    progress: Progress | None = None,
) -> Activations:
    """Hidden states [N, T, H] after the last block, in the skeleton's dtype, in a file of `folder`; one block resident.

    The caller deletes the result. Memory does not depend on N.
    """
    skeleton = model.skeleton
    shape = (len(ids), ids.shape[1], skeleton.hidden_size)
    store = Activations(folder / f"hidden-{id(model):x}.bin", shape, skeleton.dtype, create=True)
    try:
        with torch.no_grad():
            batches = embed(model, ids, batch, store)
            for block in range(len(skeleton.block_names)):
                model.load_block(block)
                observe(model, block, batches, store, store)
                model.unload_block(block)
                memory.trim()
                if progress is not None:
                    progress.step(block + 1, len(skeleton.block_names))
    except BaseException:
        store.delete()
        raise
    return store


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


def site_statistics(
    model: Model, ids: Tensor, folder: Path, needs: frozenset[str], *, batch: int = 4, progress: Progress | None = None
) -> dict[str, SiteStats]:
    """Statistics of the inputs of every site of every block, by its full name; ids int64 [N, T]."""
    skeleton = model.skeleton
    blocks = model.anatomy().blocks
    found: dict[str, SiteStats] = {}
    store = Activations(folder / "sites.bin", (*ids.shape, skeleton.hidden_size), skeleton.dtype, create=True)
    try:
        with torch.no_grad():
            batches = embed(model, ids, batch, store)
            for index, name in enumerate(skeleton.block_names):
                model.load_block(index)
                seen = observe(model, index, batches, store, store, blocks[index].sites, needs)
                found.update({f"{name}.{site}": stats for site, stats in seen.items()})
                model.unload_block(index)
                if progress is not None:
                    progress.step(index + 1, len(blocks))
    finally:
        store.delete()
    return found
