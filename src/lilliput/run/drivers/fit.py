"""How `fit` is carried out: on a block whose other steps are done."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lilliput.machine.cost import Cost
from lilliput.model.stored import Model
from lilliput.plan.plan import Plan
from lilliput.run.driver import CloseDriver
from lilliput.target import Target
from lilliput.verbs.fit import Fit
from lilliput.verbs.spec import Task
from lilliput.verbs.view import BlockFit, FitBlock, FitIO


def run(task: Task, block: FitBlock, io: FitIO, targets: Mapping[str, Target]) -> BlockFit:
    """The layers of the block, fitted together."""
    return task.of(Fit).run(block, io, targets, task.options)


def cost(plan: Plan, task: Task, model: Model) -> Cost:
    """Inputs, outputs and targets of a block."""
    states = 2 * model.skeleton.dtype.itemsize + torch.float32.itemsize
    return Cost(disk=plan.samples * plan.tokens * model.skeleton.hidden_size * states)


DRIVER = CloseDriver(verb=Fit, run=run, cost=cost)
