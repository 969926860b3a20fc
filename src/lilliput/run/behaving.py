"""The block loop's side of the verb `behave`: tensors fitted to a finished block, whose outputs are then the gated
ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lilliput.run import drivers
from lilliput.run.driver import RunningDriver
from lilliput.run.linear import BlockJob
from lilliput.runtime import behaviours
from lilliput.streaming.forward import Batches, through
from lilliput.streaming.states import Activations
from lilliput.verbs.behave import Behave, MlpIO, mlp_of
from lilliput.verbs.spec import Stage, Task


def fitting(job: BlockJob) -> tuple[Task, ...]:
    """The steps that fit something to a block that is done."""
    return tuple(x for x in job.plan.resolved.at(Stage.RUNNING) if x.of(Behave).fit is not None)


def behave(job: BlockJob, batches: Batches, inputs: Activations, outputs: Activations) -> dict[str, Tensor]:
    """What the steps add to a loaded block, by stored name; `outputs` become those of the block as it will run."""
    skeleton, index = job.model.skeleton, job.index
    block, prefix = skeleton.block(index), skeleton.block_names[index]
    mlp = mlp_of(job.model.anatomy(), index)
    module = block.get_submodule(mlp.name)
    last = module.get_submodule(mlp.columns)

    def passes() -> Iterator[tuple[Tensor, Tensor]]:
        for run in through(skeleton, index, batches, inputs, None):
            seen: dict[str, Tensor] = {}
            with _seen(module, "mlp", seen), _seen(last, "last", seen), torch.no_grad():
                run()
            yield seen["mlp"].flatten(0, -2).float(), seen["last"].flatten(0, -2).float()

    weight: Tensor = last.get_parameter("weight").detach().float()
    io = MlpIO(mlp, weight, passes)
    added: dict[str, Tensor] = {}
    for task in fitting(job):
        own = drivers.of(task, RunningDriver).run(task, io)
        named = {f"{prefix}.{mlp.name}.{name}": x.cpu() for name, x in own.items()}
        added |= named
        entry = task.of(Behave).entry(job.model.anatomy(), task.options)
        with behaviours.tried(module, f"{prefix}.{mlp.name}", entry, named.__getitem__), torch.no_grad():
            for run in through(skeleton, index, batches, inputs, outputs):
                run()
    return added


@contextmanager
def _seen(module: nn.Module, name: str, into: dict[str, Tensor]) -> Iterator[None]:
    """What enters a module is kept under a name while the context lasts."""
    handle = module.register_forward_pre_hook(lambda _, args: into.__setitem__(name, args[0].detach()))
    try:
        yield
    finally:
        handle.remove()
