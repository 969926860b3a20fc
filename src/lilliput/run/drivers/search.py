"""How `search` is carried out: losses of the whole model, each a record of the journal, and what was found at last."""

from __future__ import annotations

from torch import Tensor

from lilliput.model.stored import Model
from lilliput.plan.plan import Plan
from lilliput.progress import Progress
from lilliput.run import passes
from lilliput.run import search as trials
from lilliput.run.driver import TargetsDriver
from lilliput.run.journal import Work
from lilliput.verbs.search import Search
from lilliput.verbs.spec import Task


def run(plan: Plan, task: Task, model: Model, ids: Tensor | None, work: Work, progress: Progress) -> Plan:
    """The plan with the targets that were found, and what was found among its notes."""
    result = trials.search(plan, task, passes.budget(plan, task), model, ids, work, progress)
    return passes.with_targets(plan, task, model, *result)


def again(plan: Plan, task: Task, model: Model, work: Work) -> Plan:
    """The same, from its record."""
    result = trials.result(plan, task, work)
    if result is None:
        raise RuntimeError(f"{task.label} has found nothing, and yet there are finished blocks")
    return passes.with_targets(plan, task, model, *result)


DRIVER = TargetsDriver(verb=Search, run=run, again=again, cost=trials.cost)
