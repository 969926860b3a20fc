"""Gradients of the loss by what each block gives, for steps that weigh what a finished block stores: a pass of the
model before all decisions, one file of the work folder for each block."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from lilliput.machine import memory
from lilliput.machine.cost import Cost
from lilliput.model.weights import Model
from lilliput.plan import caching
from lilliput.plan.plan import Plan
from lilliput.progress import Progress
from lilliput.run.journal import Work
from lilliput.streaming import backward
from lilliput.streaming.backward import Samples
from lilliput.streaming.states import Activations

KIND = "slopes"


def cost(plan: Plan, model: Model) -> Cost:
    """The files, and what the pass itself has on disk."""
    count = caching.weighed(plan.resolved, plan.samples)
    skeleton = model.skeleton
    states = (len(skeleton.block_names) + 1) * skeleton.dtype.itemsize + 2 * torch.float32.itemsize
    kept = len(skeleton.block_names) * torch.float32.itemsize
    return Cost(disk=count * plan.tokens * skeleton.hidden_size * (states + kept))


def path_of(work: Work, block: int) -> Path:
    """The file of the gradient by a block's outputs, float32 [samples, tokens, hidden], of each sample's summed
    cross-entropy."""
    return work.folder / f"slopes-{block:04d}.bin"


def file_names(work: Work) -> list[str]:
    """Names of the files that the block loop still reads."""
    return [path.name for path in work.folder.glob("slopes-*.bin")]


def take(plan: Plan, model: Model, ids: Tensor | None, work: Work, progress: Progress, first: int) -> None:
    """Write the files that blocks from `first` on read, unless an earlier run has; ids [N, T] are all samples.

    Raises LilliputError where a file of the interrupted run is not what it was.
    """
    count = caching.weighed(plan.resolved, plan.samples)
    if not count:
        return
    if ids is None:
        raise RuntimeError("gradients for a cache were planned, but there are no tokens")
    samples, blocks = Samples(ids[:count], work.folder, progress), len(model.skeleton.block_names)
    shape = (len(samples.ids), samples.ids.shape[1], model.skeleton.hidden_size)
    wanted = sorted(caching.weighing(model, plan.resolved))
    if not work.find(KIND):
        _tidy(work)
        checksums: dict[str, int] = {}
        nothing: list[tuple[str, ...]] = [()] * blocks
        for block, _, _ in backward.fisher(model.skeleton, model.read, samples, nothing):
            if block in wanted:
                shutil.copyfile(backward.gradient_path(samples, block + 1), path_of(work, block))
                with Activations(path_of(work, block), shape, torch.float32, create=False) as states:
                    checksums[str(block)] = states.checksum()
            progress.step(blocks - block, blocks, "gradients for the cache")
        work.note({"kind": KIND, "checksums": checksums})
        memory.trim()
    (record,) = work.find(KIND)
    for block in wanted:
        if block < first:
            path_of(work, block).unlink(missing_ok=True)
        else:
            Activations.taken_up(path_of(work, block), shape, torch.float32, record["checksums"][str(block)]).close()


def _tidy(work: Work) -> None:
    """Remove what a killed pass has left."""
    for kind in ("slopes", "gradient", "backward"):
        for path in work.folder.glob(f"{kind}-*.bin"):
            path.unlink()
