"""How `behave` is carried out: on a finished block, whose MLP is watched while the calibration text goes through."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lilliput.machine.cost import Cost
from lilliput.model.stored import Model
from lilliput.plan.plan import Plan
from lilliput.run.driver import RunningDriver
from lilliput.verbs.behave import Behave, MlpIO
from lilliput.verbs.spec import Task


def run(task: Task, io: MlpIO) -> Mapping[str, Tensor]:
    """The tensors of the block's MLP, by their names below it."""
    spec = task.of(Behave)
    return {} if spec.fit is None else spec.fit(io, task.options)


def cost(plan: Plan, task: Task, model: Model) -> Cost:
    """What enters and leaves a block."""
    if task.of(Behave).fit is None:
        return Cost()
    return Cost(disk=2 * plan.samples * plan.tokens * model.skeleton.hidden_size * plan.dtype.itemsize)


DRIVER = RunningDriver(verb=Behave, run=run, cost=cost)
