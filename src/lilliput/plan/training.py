"""What training steps ask of a plan: objectives that exist, and linears that they can train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lilliput import methods
from lilliput.anatomy.tables import tables
from lilliput.data import load
from lilliput.data.documents import shares
from lilliput.errors import PlanError, SourceError
from lilliput.model.weights import Model
from lilliput.parts.scheme import Scheme
from lilliput.plan.resolve import LinearPlan, Resolved, matches
from lilliput.source import layers
from lilliput.verbs.objective import Objective
from lilliput.verbs.spec import Method, Stage, Task
from lilliput.verbs.train import Train, common


def objective_of(task: Task) -> tuple[Method, Objective[Any], Any]:
    """The objective that a training step names, its spec and its options. Raises PlanError where there is none of that
    name, or its options are wrong."""
    o = common(task.options)
    method = methods.get(o.objective)
    if not isinstance(method.spec, Objective):
        raise PlanError(f"{task.label}: '{o.objective}' is no objective, but of the verb '{method.spec.verb}'")
    return method, method.spec, method.parse(o.objective_options)


def trained(resolved: Resolved, task: Task) -> tuple[LinearPlan, ...]:
    """The linears of the blocks that a training step trains."""
    where = resolved.recipe.steps[task.step].where
    return tuple(x for x in resolved.linears if matches(where, x.name, x.linear))


def held(resolved: Resolved, model: Model) -> Resolved:
    """Where a recipe only trains, linears that are stored as codes stay what they are.

    Raises PlanError for a form that cannot be taken up as it is.
    """
    source = model.source
    if source.quantization is None or any(x.spec.stage is not Stage.TRAINING for x in resolved.tasks):
        return resolved

    def scheme(name: str) -> Scheme:
        try:
            return layers.scheme(source, model.stored_name(f"{name}.weight").removesuffix(".weight"))
        except SourceError as error:
            raise PlanError(f"{source.model} cannot be trained as it is: {error}") from None

    for table in tables(model.skeleton):
        if scheme(table.name).parts:
            raise PlanError(
                f"{source.model} holds its {table.role} as {scheme(table.name).describe()}, and folders are trained "
                "whose embedding and head are plain: compress the model without a step for them first"
            )
    return replace(resolved, linears=tuple(replace(x, scheme=scheme(x.name)) for x in resolved.linears))


def check(resolved: Resolved, positions: int | None) -> None:
    """Raises PlanError for an objective that is none, for a linear that a step cannot train, and for samples of more
    tokens than the model knows `positions` (None: any); DataError for text that is none."""
    for task in resolved.at(Stage.TRAINING):
        objective_of(task)
        o = common(task.options)
        if o.data is not None and positions is not None and o.tokens > positions:
            raise PlanError(f"{task.label}: samples of {o.tokens} tokens are longer than the model's {positions}")
        for name in (o.data,) if isinstance(o.data, str) else o.data or ():
            if name != "self":
                load.check(name)
        if isinstance(o.data, Mapping):
            shares(o.data, 1)
        task.of(Train).trains(task, {x.name: x.scheme for x in trained(resolved, task)})
