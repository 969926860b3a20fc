"""What training steps ask of a plan: objectives that exist, and linears that they can train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lilliput import methods
from lilliput.anatomy.tables import tables
from lilliput.data import load
from lilliput.data.documents import shares
from lilliput.data.tokens import vocabulary_of
from lilliput.errors import PlanError, SourceError
from lilliput.machine import memory
from lilliput.machine.cost import Cost, Phase
from lilliput.model.edited import unedited
from lilliput.model.weights import Model
from lilliput.parts.scheme import Scheme
from lilliput.plan import adapting
from lilliput.plan.resolve import LinearPlan, Resolved, matches
from lilliput.source import layers
from lilliput.streaming.peak import Run
from lilliput.training import watch
from lilliput.verbs.adapt import Adapt
from lilliput.verbs.objective import Objective, Widths
from lilliput.verbs.spec import Method, Stage, Task
from lilliput.verbs.train import Train, common

SMALL = 0.1  # of the teacher's parameters: below it, distillation falls short of a teacher in between


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


def check(resolved: Resolved, model: Model, teacher: Model | None) -> None:
    """Raises PlanError for an objective that is none, a linear that a step cannot train, samples of more tokens than
    the model knows positions, and a teacher that the model cannot learn from (None: the model as it was learns from
    itself); DataError for text that is none."""
    taught_by = unedited(model) if teacher is None else teacher
    for task in resolved.at(Stage.TRAINING):
        _, objective, options = objective_of(task)
        _text(task, model.skeleton.positions)
        if objective.teaches:
            _same_vocabulary(task, model, taught_by, given=teacher is not None)
        if isinstance(task.spec, Adapt):
            adapting.check(resolved, task, model, teacher, objective, options)
        else:
            task.of(Train).trains(task, {x.name: x.scheme for x in trained(resolved, task)})
        if not objective.teaches:
            continue
        reason = objective.refuses(widths(model, taught_by), options)
        if reason is not None:
            raise PlanError(f"{task.label} with the objective {common(task.options).objective}: {reason}")
        for x in (model, taught_by):
            try:
                watch.check(x.skeleton, objective.sees(options))
            except SourceError as error:
                raise PlanError(f"{task.label}: {error}") from None


def _text(task: Task, positions: int | None) -> None:
    o = common(task.options)
    if o.data is not None and positions is not None and o.tokens > positions:
        raise PlanError(f"{task.label}: samples of {o.tokens} tokens are longer than the model's {positions}")
    for name in (o.data,) if isinstance(o.data, str) else o.data or ():
        if name != "self":
            load.check(name)
    if isinstance(o.data, Mapping):
        shares(o.data, 1)
    if o.greedy is not None and o.data != "self":
        raise PlanError(f"{task.label}: `greedy` is how a teacher begins its texts: set its option `data` to self")


def _same_vocabulary(task: Task, model: Model, teacher: Model, given: bool) -> None:
    names = f"{task.label}: the teacher {teacher.source.model}"
    remedy = (
        "distributions over different tokens cannot be compared. Take a teacher with the student's tokenizer, or have "
        "this one write text, and train on that: {objective: cross-entropy, data: FILE}"
    )
    if teacher.vocabulary != model.vocabulary:
        raise PlanError(f"{names} has {teacher.vocabulary} tokens, and the student {model.vocabulary}: {remedy}")
    if not given:
        return
    ours = vocabulary_of(model.source.tokenizer())
    memory.trim()
    if vocabulary_of(teacher.source.tokenizer()) != ours:
        raise PlanError(f"{names} has another tokenizer than the student: {remedy}")


def widths(model: Model, teacher: Model) -> Widths:
    """What objectives may ask of the sizes of student and teacher."""
    configs = (model.skeleton.config, teacher.skeleton.config)
    heads = [int(getattr(x, "num_attention_heads", 1) or 1) for x in configs]
    groups = [int(getattr(x, "num_key_value_heads", None) or heads[n]) for n, x in enumerate(configs)]
    return Widths(
        student=model.skeleton.hidden_size,
        teacher=teacher.skeleton.hidden_size,
        blocks=len(model.skeleton.block_names),
        teacher_blocks=len(teacher.skeleton.block_names),
        heads=(heads[0], heads[1]),
        groups=(groups[0], groups[1]),
    )


def _parameters(model: Model) -> int:
    return sum(math.prod(shape) for shape in model.skeleton.shapes.values())


def notes(resolved: Resolved, model: Model, teacher: Model | None) -> tuple[str, ...]:
    """What a teacher of another size means."""
    tasks = [task for task in resolved.at(Stage.TRAINING) if objective_of(task)[1].teaches]
    if not tasks:
        return ()
    by = unedited(model) if teacher is None else teacher
    own, other = _parameters(model), _parameters(by)
    if own > other:
        return (f"The student has {own / other:.2f} times the parameters of its teacher {by.source.model}.",)
    if own < SMALL * other:
        return (
            f"The student has {own / other:.1%} of the parameters of its teacher {by.source.model}, which students of "
            "two fifths of its size learn best from: train one in between first, and let that one be the teacher.",
        )
    return ()


def phases(resolved: Resolved, run: Run, model: Model, teacher: Model | None) -> tuple[Phase, ...]:
    """What training takes beyond its own steps, where the teacher runs beside the student: the whole of it, what both
    show, and copies of weights while the student writes."""
    found: list[Phase] = []
    by = unedited(model) if teacher is None else teacher
    for task in resolved.at(Stage.TRAINING):
        _, objective, options = objective_of(task)
        if isinstance(task.spec, Adapt):
            found.append(adapting.phase(resolved, task, run, model))
        if not objective.beside(options):
            continue
        o, shown = common(task.options), 0
        rows, fields, size = (o.at_once or 1), objective.sees(options), widths(model, by)
        for blocks, heads, width in (
            (size.blocks, size.heads[0], size.student),
            (size.teacher_blocks, size.heads[1], size.teacher),
        ):
            count = 1 if objective.sees_last else blocks
            maps = 3 * len(fields & {"attention", "scores"}) * heads * o.tokens
            shown += 4 * count * rows * o.tokens * (maps + 2 * width * bool(fields))
        whole = _parameters(by) * run.itemsize
        writes = 0
        if objective.rolls(options):
            caches = 4 * 2 * o.batch * o.tokens * (size.blocks * size.student + size.teacher_blocks * size.teacher)
            writes = 4 * sum(x.linear.parameters for x in trained(resolved, task)) + caches
        alone = found[-1:] if isinstance(task.spec, Adapt) else task.phases(run)
        own = max((x.cost.ram for x in alone), default=0)
        found.append(Phase("training beside its teacher", Cost(ram=own + whole + shown + writes)))
    return tuple(found)
