"""How training steps are carried out: with the whole model in memory or block by block, alone or shared out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lilliput.errors import PlanError, SourceError
from lilliput.machine import memory
from lilliput.model.weights import Model
from lilliput.plan import training_cost
from lilliput.plan.objectives import objective_of
from lilliput.plan.resolve import Resolved
from lilliput.streaming.peak import Run
from lilliput.units import readable
from lilliput.verbs.spec import Stage, Task
from lilliput.verbs.train import Train, common


@dataclass(frozen=True)
class Driving:
    """How training steps are carried out. drivers: number of a step, and whether the model is trained "whole" or
    "streamed"; sharing: the steps whose weights processes share out; disk: bytes that they have in the work folder."""

    drivers: tuple[tuple[int, str], ...] = ()
    sharing: frozenset[int] = frozenset()
    disk: int = 0

    def streamed(self, step: int) -> bool:
        """Whether that step goes block by block."""
        return (step, "streamed") in self.drivers

    def facts(self) -> dict[str, Any]:
        """What a resumed run has to agree on."""
        return {"drivers": self.drivers} if any(driver == "streamed" for _, driver in self.drivers) else {}


UNDRIVEN = Driving()  # of a recipe that trains nothing


def unstreamed(resolved: Resolved, task: Task, model: Model) -> str | None:
    """Why a training step cannot go block by block, with the remedy; None: it can."""
    o, (_, objective, options) = common(task.options), objective_of(task)
    if not isinstance(task.spec, Train):
        return "an adapter is trained beside the whole folder, as packed as it is: set `driver` to whole"
    if objective.tokens_loss is None or objective.features_loss is not None or objective.beside(options):
        return (
            f"the objective {o.objective} has the teacher run beside the student, both whole in memory: choose "
            "logit-kd, divergence-kd or cross-entropy, or set `driver` to whole"
        )
    if o.optimizer == "adamw-8bit":
        return "moments lie on disk in float32, and not in 8 bits: set `optimizer` to paged"
    running = (*resolved.at(Stage.RUNNING), *resolved.at(Stage.CACHE))
    if running:
        return (
            f"{running[0].label} changes how blocks run together, which is trained with the whole model in memory "
            "alone: leave that step to a later run, or set `driver` to whole"
        )
    outside = [name for name in model.skeleton.embeddings if o.trains(name)]
    if outside:
        tied = ", which is the head too," if outside[0] == model.skeleton.head else ""
        return (
            f"`others` names {outside[0]}{tied} and embeddings stay as they are there: name fewer tensors, or set "
            "`driver` to whole"
        )
    try:
        model.skeleton.calls(1, 2)
    except SourceError as error:
        return f"{error}: set `driver` to whole"
    return None


def unshared(resolved: Resolved, task: Task, model: Model) -> str | None:
    """Why processes cannot share out what a training step trains, with the remedy; None: they can."""
    o, (_, objective, options) = common(task.options), objective_of(task)
    if not isinstance(task.spec, Train):
        return "an adapter is whole in each of them, beside the whole folder: set `shard` to false"
    if task.spec.moves:
        return "it looks at whole weights between two passes: set `shard` to false"
    if o.driver == "streamed":
        return "streamed, each process has one block in memory anyway: set `shard` to false, or `driver` to whole"
    if o.optimizer == "adamw-8bit":
        return "moments in 8 bits are those of whole weights: set `optimizer` to adamw or paged, or `shard` to false"
    if objective.rolls(options) or objective.opening(options):
        return f"with the objective {o.objective} processes pass through the model unequally: set `shard` to false"
    if any(x.linear.expert is not None for x in resolved.linears):
        return "an expert that the samples of one process do not reach is missing on the way back: set `shard` to false"
    return None


def _sharing(resolved: Resolved, model: Model, processes: int) -> frozenset[int]:
    """The training steps, by number, whose weights so many processes share out."""
    found = set()
    for task in resolved.at(Stage.TRAINING) if processes > 1 else ():
        if common(task.options).shard is not False and unshared(resolved, task, model) is None:
            found.add(task.step)
    return frozenset(found)


def _drivers(resolved: Resolved, run: Run, model: Model, budget: int | None) -> dict[int, str]:
    """By number of a training step, whether the model is trained "whole" or "streamed", where a run may take `budget`
    bytes. Without a budget it is whole: what else runs on a machine must not decide it."""
    found: dict[int, str] = {}
    for task in resolved.at(Stage.TRAINING):
        driver: str = common(task.options).driver
        if driver == "auto":
            most = training_cost.whole(task, run, model)
            fits = budget is None or int((memory.BASE + most) * memory.SLACK) <= budget
            driver = "whole" if fits or unstreamed(resolved, task, model) is not None else "streamed"
        found[task.step] = driver
    return found


def _driven(resolved: Resolved, chosen: Mapping[int, str], shared: Collection[int]) -> Resolved:
    """The steps with the drivers that were chosen, and whether weights are shared out, to add up what they take."""

    def one(task: Task) -> Task:
        if task.spec.stage is not Stage.TRAINING:
            return task
        decided: dict[str, Any] = {"shard": task.step in shared}
        if task.step in chosen:
            decided["driver"] = chosen[task.step]
        return replace(task, options=task.options.model_copy(update=decided))

    return replace(resolved, tasks=tuple(one(task) for task in resolved.tasks))


def decided(
    resolved: Resolved, run: Run, model: Model, teacher: Model | None, budget: int | None
) -> tuple[Resolved, Driving]:
    """How training steps are carried out where a run may take `budget` bytes, and the steps with that in their
    options, to add up what they take. Raises PlanError where weights are to be shared out that there is no room for."""
    shared = _sharing(resolved, model, run.processes)
    chosen = _drivers(_driven(resolved, {}, shared), run, model, budget)
    for task in resolved.at(Stage.TRAINING):
        if common(task.options).shard and chosen[task.step] == "streamed":
            raise PlanError(
                f"{task.label} is to be shared out over processes, and {readable(budget or 0)} of memory let it go "
                "block by block alone, where each has one block anyway: give more with --memory, or leave out `shard`"
            )
    shared -= {step for step, driver in chosen.items() if driver == "streamed"}
    steps = _driven(resolved, chosen, shared)
    return steps, Driving(tuple(chosen.items()), shared, training_cost.disk(steps, chosen, run, model, teacher))
