"""Parameters of a model that processes share out among themselves, block by block, by torch's `fully_shard`.

Each process keeps its part of the rows of every parameter of a block, with its gradient and moments. A block's
parameters are whole on all while it runs, there and back. What lies outside the blocks stays whole on each process.
Gradients come back as the mean over processes, where a step wants their sum (`optimizers.summed`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lilliput.machine import ranks
from lilliput.training.student import Student
from lilliput.verbs.trained import Trained

# What looks at whole leaves between two passes, when they are shared out.
HOOKS = ("step", "penalty", "after_backward", "after_step")


def share_block(student: Student, number: int) -> None:
    """Share out a loaded block, with what is trained of it in place. Every process calls it for the same blocks.

    Raises RuntimeError for a method that looks at whole leaves, which the plan should have refused.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    block = student.skeleton.block(number)
    for core in block.modules():
        own = [x for x in HOOKS if isinstance(core, Trained) and getattr(type(core), x) is not getattr(Trained, x)]
        if own:
            raise RuntimeError(f"{type(core).__name__} looks at whole weights in {own[0]}: declare moves=True")
    kind = torch.device(student.skeleton.device).type
    with ranks.talking():
        fully_shard(block, mesh=init_device_mesh(kind, (ranks.size(),)), reshard_after_forward=True)


def whole_again(student: Student, number: int, *, whole: bool) -> None:
    """Have the parameters of a block whole on all processes, or shared out once more."""
    block: Any = student.skeleton.block(number)
    with ranks.talking():
        block.unshard() if whole else block.reshard()


def gathered(value: Tensor) -> Tensor:
    """A tensor that processes have shared out, whole on all; any other as it is."""
    full: Any = getattr(value, "full_tensor", None)
    if full is None:
        return value
    with ranks.talking():
        whole: Tensor = full()
    return whole


def like(part: Tensor, value: Tensor) -> Tensor:
    """This process's `part` of a tensor that is shared out as `value` is, as that tensor."""
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        return part
    shared: Tensor = DTensor.from_local(
        part, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
    return shared


def part(whole: Tensor, value: Tensor) -> Tensor:
    """This process's part of a tensor, shared out as `value` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(value, DTensor):
        return whole
    with ranks.talking():
        own: Tensor = distribute_tensor(whole.to(value.device), value.device_mesh, value.placements).to_local()
    return own
