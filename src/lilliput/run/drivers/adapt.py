"""How `adapt` is carried out: beside the finished folder, by `lilliput.run.training`."""

from __future__ import annotations

from lilliput.machine.cost import Cost
from lilliput.model.stored import Model
from lilliput.plan.plan import Plan
from lilliput.run.driver import TrainingDriver
from lilliput.verbs.adapt import Adapt, settings
from lilliput.verbs.spec import Task


def cost(plan: Plan, task: Task, model: Model) -> Cost:
    """The folder a second time, a state to go on from and the best one, and what the teacher says of the text."""
    o, spec = settings(task.options), task.of(Adapt)
    linears = [x.linear for x in plan.resolved.linears]
    blocks = len(model.skeleton.block_names)
    count = spec.parameters(linears, task.target, o) + spec.fixed(model.skeleton.hidden_size, blocks, o)
    places = min(o.steps * o.batch, plan.samples if o.data is None else o.steps * o.batch) * o.tokens
    kept = model.vocabulary if o.top is None else min(o.top, model.vocabulary)
    hidden = 2 * places * model.skeleton.hidden_size * plan.dtype.itemsize
    return Cost(disk=plan.bytes + (2 * 12 + 4 + 8) * count + places * (8 * kept + 8) + hidden)


DRIVER = TrainingDriver(verb=Adapt, cost=cost)
