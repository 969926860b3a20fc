"""How `learn` is carried out: the leader learns, and the matrix is a file of the work folder."""

from __future__ import annotations

import torch

from lilliput.machine.cost import Cost
from lilliput.model.stored import Model
from lilliput.plan.plan import Plan
from lilliput.run import passes
from lilliput.run.driver import ModelDriver
from lilliput.verbs.learn import Learn
from lilliput.verbs.spec import Task


def cost(plan: Plan, task: Task, model: Model) -> Cost:
    """Hidden states that enter every place, and the gradient."""
    sequences = task.of(Learn).sequences
    if sequences is None:
        return Cost()
    skeleton = model.skeleton
    states = (len(skeleton.block_names) + 1) * skeleton.dtype.itemsize + torch.float32.itemsize
    return Cost(disk=sequences(task.options, plan.samples) * plan.tokens * skeleton.hidden_size * states)


def files(task: Task) -> tuple[str, ...]:
    """The matrix, which is needed as long as the model is read."""
    return (passes.rotation_name(task),)


DRIVER = ModelDriver(verb=Learn, run=passes.learned, cost=cost, files=files)
