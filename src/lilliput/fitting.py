"""The block loop's side of the verb `fit`: the block as something that can be run with other weights, and its targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lilliput import lockstep
from lilliput.activations import Activations
from lilliput.anatomy.model import Block, Site
from lilliput.forward import Batches
from lilliput.methods.view import BlockFit, FitBlock, FitIO, Run
from lilliput.model import Model
from lilliput.parts.layer import Layer
from lilliput.resolve import Task
from lilliput.stats import fold
from lilliput.stats.site import SiteStats

TARGETS = "targets.bin"


def runner(model: Model, index: int, anatomy: Block, batches: Batches) -> Run:
    """A loaded block as a function of the weights of its linears and its inputs; see `FitBlock`.

    Where the skeleton computes in half precision, matrix products do too, while hidden states, norms and biases stay
    float32: differences between two runs are then those of the weights, not of rounded sums.
    """
    skeleton = model.skeleton
    names = skeleton.names_of(index)
    cut = len(skeleton.block_names[index]) + 1
    transposed = {x.name for x in anatomy.linears if x.transposed}
    small = {n[cut:]: skeleton.tensor(n).float() for n in names if _float(skeleton.tensor(n)) == 1}
    half = skeleton.dtype is not torch.float32
    calls = dict(batches.calls)

    def run(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        count = len(hidden)
        if count not in calls:
            calls[count] = skeleton.calls(count, hidden.shape[1])
        tensors = dict(small)
        for name, value in weights.items():
            tensors[f"{name}.weight"] = value.T if name in transposed else value
        device = torch.device(skeleton.device).type
        with torch.autocast(device, skeleton.dtype) if half else nullcontext():
            return skeleton.run(index, hidden.float(), calls[count], tensors).float()

    return run


def _float(tensor: Tensor) -> int:
    return tensor.dim() if tensor.is_floating_point() else -1


def observe(
    model: Model,
    index: int,
    run: Run,
    batches: Batches,
    inputs: Activations,
    sites: Sequence[Site],
    needs: frozenset[str],
) -> tuple[Activations, dict[str, SiteStats]]:
    """Outputs of the block as it is, in a file beside `inputs` that the caller deletes; statistics of its sites."""
    skeleton = model.skeleton
    targets = Activations(inputs.path.with_name(TARGETS), inputs.shape, torch.float32, create=True)
    states = {site.name: fold.init(site.width, needs, skeleton.device) for site in sites}
    taps = [lockstep.Tap(s.name, skeleton.block(index).get_submodule(s.linears[0])) for s in sites if needs]

    def see(site: str, x: Tensor) -> None:
        states[site] = fold.update(states[site], x)

    def one(start: int, stop: int) -> Callable[[], None]:
        def forward() -> None:
            targets.write(start, run({}, inputs.read(start, stop).to(skeleton.device)))

        return forward

    lockstep.watch(taps, [one(a, b) for a, b in batches.bounds], see, stop_after=False)
    return targets, {name: fold.all_reduce(fold.finish(state)) for name, state in states.items()}


def carry_out(task: Task, block: FitBlock, io: FitIO, tasks: Mapping[str, Task]) -> BlockFit:
    """One step on one block; `tasks`: the step as each covered linear has it, targets of its own included."""
    with torch.enable_grad():
        out: BlockFit = task.method.module.fit(block, io, {n: t.target for n, t in tasks.items()}, task.options)
    missing = block.layers.keys() ^ out.layers.keys()
    if missing:
        raise RuntimeError(f"{task.method.name} was to fit {sorted(block.layers)} and differs by {sorted(missing)}")
    return out


def covered(tasks: Mapping[str, Task], layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers that a step covers, in the order of `layers`."""
    return {name: layer for name, layer in layers.items() if name in tasks}
