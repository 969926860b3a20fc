"""Rules of order that several verbs have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lilliput.errors import PlanError
from lilliput.target import Target
from lilliput.verbs.spec import Around, Stage, Task


def _settled(task: Task, recipe: Sequence[Task]) -> Task | None:
    """The first step before `task` that decides the values of weights."""
    return next((x for x in recipe[: task.step] if x.spec.settles), None)


def before_values(task: Task, recipe: Sequence[Task]) -> None:
    """Raises PlanError where the step changes weights whose values an earlier step has decided."""
    settled = _settled(task, recipe)
    if settled is not None:
        raise PlanError(
            f"{task.label} rescales or rotates weights, but {settled.label} before it has already "
            "decided their values: move it to the front"
        )


def before_spending(task: Task, recipe: Sequence[Task]) -> None:
    """Raises PlanError where the step divides a budget that is spent already, or that no step spends."""
    settled = _settled(task, recipe)
    if settled is not None:
        raise PlanError(
            f"{task.label} divides the budget between layers, so it must come before {settled.label} spends it"
        )
    if all(x.spec.stage is Stage.TARGETS for x in recipe):
        raise PlanError("the recipe only divides a budget: add a step that prunes or quantizes")


def same_target(task: Task, earlier: Task, asked: Target | None, name: str, does: str) -> Target:
    """The target of an earlier step on the linear `name`, which the step takes over; `does`: what it does to that
    step's result. Raises PlanError where the recipe asks for another one."""
    stated = set() if asked is None else asked.model_fields_set
    if task.target.model_dump(include=stated) != earlier.target.model_dump(include=stated):
        raise PlanError(f"{task.label} on {name} {does}, which has another target: leave the target of this step out")
    return earlier.target


def governing(task: Task, around: Around) -> None:
    """Raises PlanError where no later step's target is the step's to decide."""
    if not around.governed:
        raise PlanError(f"{task.label} divides a budget, but no step after it compresses the layers that it covers")


def divisible(task: Task, around: Around, refuse: Callable[[Target, Any], str | None] | None) -> None:
    """Raises PlanError with what `refuse` says of the target of a step that the step governs."""
    for target in dict.fromkeys(x.target for x in around.governed.values()):
        reason = None if refuse is None else refuse(target, task.options)
        if reason is not None:
            raise PlanError(f"{task.label}: {reason}")
