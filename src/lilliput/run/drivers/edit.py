"""How `edit` is carried out: scores of all blocks or losses without some of them, and one decision, in the journal."""

from __future__ import annotations

from lilliput.machine.cost import Cost
from lilliput.model.edited import unedited
from lilliput.model.stored import Model
from lilliput.plan.plan import Plan
from lilliput.run import editing
from lilliput.run.driver import ModelDriver
from lilliput.verbs.edit import Edit
from lilliput.verbs.gated import GateOptions
from lilliput.verbs.spec import Task
from lilliput.verbs.train import common


def cost(plan: Plan, task: Task, model: Model) -> Cost:
    """Hidden states on both sides of a block, or those that enter every block."""
    spec, base = task.of(Edit), unedited(model).skeleton
    if not (task.needs or spec.tokens(task.options)):
        return Cost()
    every = spec.slopes(task.options) or spec.loss is not None
    states = len(base.block_names) + 3 if every else 2
    samples = plan.samples if spec.looked_at is None else spec.looked_at(plan.samples, task.options)
    passes = samples * plan.tokens * base.hidden_size * states * max(base.dtype.itemsize, 4 * every)
    weights = sum(x.parameters for block in unedited(model).anatomy().blocks for x in block.linears)
    updates = spec.asks(spec.updates, task.options) or spec.trained is not None
    return Cost(disk=passes + updates * 4 * weights + _trained(plan, task, weights, model))


def _trained(plan: Plan, task: Task, weights: int, model: Model) -> int:
    """Bytes of a state of weights, gates and adapters that training goes on from, of the one before it, of what is kept
    of it, and of what the teacher says of the text."""
    if task.of(Edit).trained is None:
        return 0
    o = common(task.options)
    whole = isinstance(o, GateOptions) and o.weights == "trained"
    samples = plan.samples if o.data is None else o.steps * o.batch
    places = samples * (plan.tokens if o.data is None else o.tokens)
    kept = model.vocabulary if o.top is None else min(o.top, model.vocabulary)
    return (2 * 12 + 4) * weights * whole + places * (8 * kept + 4)


DRIVER = ModelDriver(verb=Edit, run=editing.edited, cost=cost)
