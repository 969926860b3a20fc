"""The stages of a run before its block loop: each step is carried out by the driver of its verb."""

from __future__ import annotations

from functools import reduce

from torch import Tensor

from lilliput.machine.cost import Cost
from lilliput.model.stored import Model
from lilliput.plan.plan import Plan
from lilliput.progress import Progress
from lilliput.run import drivers
from lilliput.run.driver import ModelDriver, TargetsDriver
from lilliput.run.journal import Work
from lilliput.verbs.spec import Stage


def cost(plan: Plan, model: Model) -> Cost:
    """What the recipe's steps take, one after the other, beyond what every run does."""
    return reduce(Cost.then, (drivers.find(task).cost(plan, task, model) for task in plan.resolved.tasks), Cost())


def files(plan: Plan) -> list[str]:
    """Names of files in the work folder that the block loop still needs of earlier stages."""
    return [name for task in plan.resolved.tasks for name in drivers.find(task).files(task)]


def prepared(plan: Plan, model: Model, ids: Tensor | None, work: Work, progress: Progress) -> Model:
    """The model after the recipe's steps on the whole of it. ids [N, T] are all samples."""
    for task in plan.resolved.at(Stage.MODEL):
        model = drivers.of(task, ModelDriver).run(plan, task, model, ids, work, progress)
    return model


def allocated(plan: Plan, model: Model, ids: Tensor | None, work: Work, progress: Progress) -> Plan:
    """The plan with the targets that the recipe's steps decide on. ids [N, T] are all samples."""
    for task in plan.resolved.at(Stage.TARGETS):
        plan = drivers.of(task, TargetsDriver).run(plan, task, model, ids, work, progress)
    return plan


def decided(plan: Plan, model: Model, work: Work) -> Plan:
    """What `allocated` has made of the plan, once more from the journal of a run whose blocks are finished."""
    for task in plan.resolved.at(Stage.TARGETS):
        plan = drivers.of(task, TargetsDriver).again(plan, task, model, work)
    return plan
