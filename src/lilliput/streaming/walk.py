"""The walk over the blocks of a model: one of them in memory at a time, hidden states between them in files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lilliput.anatomy.skeleton import Skeleton
from lilliput.machine import memory, ranks
from lilliput.model.weights import Model
from lilliput.progress import Progress
from lilliput.streaming.forward import Batches, embed, through
from lilliput.streaming.pieces import CHUNK, Pieces
from lilliput.streaming.states import Activations


class Loader(Protocol):
    """What puts the blocks of a skeleton into memory one by one, such as a model."""

    @property
    def skeleton(self) -> Skeleton: ...

    def load_block(self, i: int) -> None: ...

    def unload_block(self, i: int) -> None: ...


def resident(*loaders: Loader, blocks: range | None = None) -> Iterator[int]:
    """The number of each block, all of them or some, while all loaders have it in memory.

    A caller that needs the room sooner may unload the block itself before it goes on.
    """
    for block in range(len(loaders[0].skeleton.block_names)) if blocks is None else blocks:
        for loader in loaders:
            loader.load_block(block)
        yield block
        for loader in loaders:
            loader.unload_block(block)
        memory.trim()


@dataclass(frozen=True)
class Flow:
    """What a walk takes through the blocks: ids int64 [N, T], `batch` samples at a time. The hidden states [N, T, H]
    that enter block 3 lie in `folder`/`stem`-0003.bin, as `dtype`."""

    ids: Tensor
    batch: int
    folder: Path
    stem: str
    dtype: torch.dtype

    def path(self, block: int) -> Path:
        """The file of what enters a block, or leaves the one before."""
        return self.folder / f"{self.stem}-{block:04d}.bin"


@dataclass(frozen=True)
class Passage:
    """A loaded block, how it is called, the states that enter it, and the file for those that leave it, which the
    caller fills. In a walk without hidden states there is the number alone, and nothing is loaded."""

    block: int
    batches: Batches | None = None
    inputs: Activations | None = None
    outputs: Activations | None = None

    def checksum(self) -> list[int] | None:
        """Of the outputs of all ranks, for the record that says that the block is finished."""
        return None if self.outputs is None else ranks.gathered(self.outputs.checksum())


def walk(
    model: Model, flow: Flow | None, *, first: int = 0, recorded: Sequence[int] | None = None, keep: bool = False
) -> Iterator[Passage]:
    """Every block from `first` on, in order. A block's inputs are deleted when the caller goes on from it, so what it
    has made of the block has to be durable by then, and its checksum recorded.

    `keep`: what leaves the last block stays in its file.
    `recorded`: the checksum in the record of the block before `first`, whose outputs an interrupted walk has left.
    Raises LilliputError, on all ranks, where they are not what it wrote. Without a `flow` nothing is run or loaded.
    """
    count = len(model.skeleton.block_names)
    if flow is None:
        for block in range(first, count):
            yield Passage(block)
            memory.trim()
        return
    shape = (len(flow.ids), flow.ids.shape[1], model.skeleton.hidden_size)
    if recorded is None:
        with ranks.together():
            inputs = Activations(flow.path(first), shape, flow.dtype, create=True)
    else:
        inputs = taken_up(model, flow, first, recorded)
    batches = embed(model, flow.ids, flow.batch, inputs if recorded is None else None)
    for block in resident(model, blocks=range(first, count)):
        outputs = Activations(flow.path(block + 1), shape, flow.dtype, create=True)
        yield Passage(block, batches, inputs, outputs)
        inputs.delete()
        inputs = outputs
    if keep:
        inputs.close()
    else:
        inputs.delete()


def taken_up(model: Model, flow: Flow, block: int, recorded: Sequence[int]) -> Activations:
    """The states that enter a block, or leave the last one, from the file of a walk, whose checksums on all ranks were
    `recorded`. Raises LilliputError, on all ranks, where they are not what it wrote."""
    shape = (len(flow.ids), flow.ids.shape[1], model.skeleton.hidden_size)
    with ranks.together():
        return Activations.taken_up(flow.path(block), shape, flow.dtype, recorded[ranks.rank()])


def last_hidden(
    model: Model,
    ids: Tensor,
    folder: Path,
    *,
    batch: int = 2,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Activations:
    """Hidden states [N, T, H] after the last block, in the skeleton's dtype, in a file of `folder`; one block resident.

    A block whose cache is compressed reads `chunk` tokens at a time, through that cache. The caller deletes the result.
    Memory does not depend on N.
    """
    skeleton = model.skeleton
    pieces = Pieces(skeleton, chunk)
    shape = (len(ids), ids.shape[1], skeleton.hidden_size)
    store = Activations(folder / f"hidden-{id(model):x}.bin", shape, skeleton.dtype, create=True)
    try:
        with torch.no_grad():
            batches = embed(model, ids, batch, store)
            for block in resident(model):
                pace = pieces.through if pieces.wanted(block) else partial(through, skeleton)
                for run in pace(block, batches, store, store):
                    run()
                if progress is not None:
                    progress.step(block + 1, len(skeleton.block_names))
    except BaseException:
        store.delete()
        raise
    return store
