"""How `repair` is carried out: on a loaded block of an edited model, beside the unedited one."""

from __future__ import annotations

from lilliput.machine.cost import Cost
from lilliput.model.stored import Model
from lilliput.plan.plan import Plan
from lilliput.run import repairing
from lilliput.run.driver import RepairDriver
from lilliput.verbs.repair import Repair
from lilliput.verbs.spec import Task


def cost(plan: Plan, task: Task, model: Model) -> Cost:
    """Hidden states of the unedited model, beside those that enter and leave a block."""
    return Cost(disk=3 * plan.samples * plan.tokens * model.skeleton.hidden_size * plan.dtype.itemsize)


DRIVER = RepairDriver(verb=Repair, run=repairing.repaired, cost=cost)
