"""The pass before all decisions that takes squared gradients, from the last block down: one file of the work folder
for each, and a record with the checksum of the gradient that has come so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lilliput.errors import LilliputError
from lilliput.machine import memory, ranks
from lilliput.machine.cost import Cost
from lilliput.model.block import BlockWeights
from lilliput.model.weights import Model
from lilliput.parts.layer import Layer
from lilliput.plan.plan import Plan
from lilliput.plan.resolve import LinearPlan
from lilliput.progress import Progress
from lilliput.run.journal import Work, save_atomically
from lilliput.streaming import backward
from lilliput.streaming.backward import Samples
from lilliput.streaming.states import START_ANEW, Activations


def cost(plan: Plan, model: Model) -> Cost:
    """Hidden states and gradients that are on disk at once while the pass runs, beside what is `stored`."""
    skeleton = model.skeleton
    states = (len(skeleton.block_names) + 1) * skeleton.dtype.itemsize + 2 * torch.float32.itemsize
    return Cost(disk=plan.resolved.fisher(plan.samples) * plan.tokens * skeleton.hidden_size * states)


def stored(plan: Plan) -> Cost:
    """The squared gradients, which stay in the work folder until their block is compressed."""
    names = plan.resolved.squared()
    weights = sum(x.linear.parameters for x in plan.resolved.linears if x.name in names)
    return Cost(disk=torch.float32.itemsize * weights)


def path_of(work: Work, block: int) -> Path:
    """The file of a block's squared gradients: float32 [out, in] by the linear's name within the block."""
    return work.folder / f"fisher-{block:04d}.safetensors"


def file_names(work: Work) -> list[str]:
    """Names of the files that the block loop still reads."""
    return [path.name for path in work.folder.glob("fisher-*.safetensors")]


def reader(path: Path) -> Callable[[str], Tensor]:
    """Squared gradients by the linear's name within the block, one at a time from the block's file."""

    def read(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            squares: Tensor = file.get_tensor(name)
        return squares

    return read


def layer(path: Path | None, plan: LinearPlan, weights: BlockWeights) -> Layer:
    """A linear under compression on the compute device, with the squared gradients by its weight as folds have left it
    where a step reads them; `path` is the file of its block."""
    weight, squares = weights.linear(plan.linear).to(weights.device), None
    if path is not None and any(task.fisher for task in plan.tasks):
        squares = weights.through_folds(plan.linear, reader(path)(plan.linear.name)).to(weights.device)
    return Layer(plan.name, weight, fisher=squares)


def take(plan: Plan, model: Model, ids: Tensor | None, work: Work, progress: Progress, first: int) -> None:
    """Take the squared gradients of all linears that a step weighs by them.

    ids [N, T] are all samples, of which each rank takes its share. A run that goes on begins below the lowest block
    that it has; blocks below `first` are compressed already. Raises LilliputError for squares that are not finite, with
    the tensor's name, and where a file of the interrupted run is not what it was.
    """
    count = plan.resolved.fisher(plan.samples)
    if not count:
        return
    if ids is None:
        raise RuntimeError("squared gradients were planned, but there are no tokens")
    prefixes = model.skeleton.block_names
    samples = Samples(ids[:count][ranks.share(count)], work.folder, progress)
    names = plan.resolved.squared()
    names_by_block = [
        {f"{x.name}.weight" for x in plan.resolved.of_block(n) if x.name in names} for n in range(len(prefixes))
    ]
    records = {int(record["block"]): record for record in work.find("fisher")}
    _tidy(work, samples, records, first, len(prefixes))
    with ranks.together():
        lowest = min(records, default=0)
        if lowest:
            shape = (len(samples.ids), samples.ids.shape[1], model.skeleton.hidden_size)
            path = backward.gradient_path(samples, lowest)
            Activations.taken_up(path, shape, torch.float32, records[lowest]["gradient"][ranks.rank()]).close()
        for block in range(first, len(prefixes)):
            if ranks.lead() and block in records and names_by_block[block] and not path_of(work, block).is_file():
                raise LilliputError(
                    f"{path_of(work, block)} was written by the unfinished run and is missing; {START_ANEW}"
                )
    transposed = {f"{x.name}.weight" for x in plan.resolved.linears if x.linear.transposed}
    for block, squares, states in backward.fisher(model.skeleton, model.read, samples, names_by_block, done=records):
        tensors: dict[str, Tensor] = {}
        for name, total in squares.items():
            mean = ranks.add(total).div_(count)
            with ranks.together():
                if not bool(torch.isfinite(mean).all()):
                    raise LilliputError(
                        f"the Fisher information of {name} contains NaN or infinity: the gradient of the loss "
                        f"overflows in {str(plan.dtype).removeprefix('torch.')}; compute in float32 or bfloat16 "
                        "(dtype), or leave the method out"
                    )
            short = name.removeprefix(f"{prefixes[block]}.").removesuffix(".weight")
            tensors[short] = (mean.T if name in transposed else mean).contiguous().cpu()
            del total, mean
        if tensors and ranks.lead():
            save_atomically(path_of(work, block), tensors)
        del tensors, squares
        record = {"kind": "fisher", "block": block, "gradient": ranks.gathered(states.checksum())}
        work.note(record)
        progress.step(len(prefixes) - block, len(prefixes), "squared gradients")
        memory.trim()


def _tidy(work: Work, samples: Samples, records: Mapping[int, object], first: int, count: int) -> None:
    """Remove what a run that was killed between a record and its tidying has left over."""
    for block in range(first):
        path_of(work, block).unlink(missing_ok=True)
    lowest = min(records, default=count)
    for path in work.folder.glob("gradient-*.bin"):
        if not 0 < lowest < count or path != backward.gradient_path(samples, lowest):
            path.unlink()
    for path in work.folder.glob("backward-*.bin"):
        path.unlink()
