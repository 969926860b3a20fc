"""What training steps ask of a plan: objectives that exist, and linears that they can train."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from lilliput import methods
from lilliput.anatomy.tables import tables
from lilliput.data import load
from lilliput.data.documents import shares
from lilliput.data.tokens import vocabulary_of
from lilliput.errors import PlanError, SourceError
from lilliput.export import provenance
from lilliput.machine import memory
from lilliput.model.edited import unedited
from lilliput.model.weights import Model
from lilliput.parts.scheme import Scheme
from lilliput.plan import adapting, driving
from lilliput.plan.objectives import objective_of, parameters, trained, widths
from lilliput.plan.resolve import LinearPlan, Resolved
from lilliput.source import layers
from lilliput.training import watch
from lilliput.verbs.adapt import Adapt
from lilliput.verbs.spec import Stage, Task
from lilliput.verbs.train import Train, common

SMALL = 0.1  # of the teacher's parameters: below it, distillation falls short of a teacher in between


def _only_trains(resolved: Resolved, model: Model) -> bool:
    """Whether a folder that is stored as codes is trained as it is."""
    return model.source.quantization is not None and all(x.spec.stage is Stage.TRAINING for x in resolved.tasks)


def held(resolved: Resolved, model: Model) -> Resolved:
    """Where a recipe only trains, linears that are stored as codes stay what they are.

    Raises PlanError for a form that cannot be taken up as it is.
    """
    if not _only_trains(resolved, model):
        return resolved
    source = model.source

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
    folded = None if teacher is None else _folded(model)
    for task in resolved.at(Stage.TRAINING):
        _, objective, options = objective_of(task)
        _text(task, model.skeleton.positions, adapting.lengthening(task))
        if objective.teaches:
            if teacher is None and _only_trains(resolved, model):
                raise PlanError(
                    f"{task.label}: {model.source.model} is compressed already, and would learn from itself: name the "
                    "original with --teacher"
                )
            _same_vocabulary(task, model, taught_by, given=teacher is not None)
        if isinstance(task.spec, Adapt):
            adapting.check(resolved, task, model, teacher, objective, options)
            if folded is not None:
                task.of(Adapt).begins(task, folded)
        else:
            spec, linears = task.of(Train), trained(resolved, task)
            spec.trains(task, {x.name: x.scheme for x in linears})
            if folded is not None:
                spec.begins(task, folded)
            _others(resolved, task, model, linears)
            if teacher is not None and spec.restarts(spec.options_of(task)) is not None:
                adapting.original(task, model, teacher, linears)
        if common(task.options).shard:
            reason = driving.unshared(resolved, task, model)
            if reason is not None:
                raise PlanError(f"{task.label} cannot be shared out over processes: {reason}")
        if common(task.options).driver == "streamed":
            reason = driving.unstreamed(resolved, task, model)
            if reason is not None:
                raise PlanError(f"{task.label} cannot go block by block: {reason}")
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


def _folded(model: Model) -> str | None:
    """The first step of the recipe of a finished folder that has changed what weights stand for; None: none has."""
    record = provenance.read(model.source.folder)
    known = methods.discover()
    for x in () if record is None else record.recipe.get("steps", ()):
        method = known.get(str(x["method"]))
        if method is None or isinstance(method.spec, Adapt):
            continue
        if isinstance(method.spec, Train) or method.spec.folds(method.parse(x.get("options") or {})):
            return f"{method.name} in {model.source.model}"
    return None


def _others(resolved: Resolved, task: Task, model: Model, linears: Collection[LinearPlan]) -> None:
    """Raises PlanError for `others` that name nothing, or a linear that is stored as codes."""
    o = common(task.options)
    found = {name for name in model.skeleton.shapes if o.trains(name)}
    if o.others and not found:
        some = ", ".join(sorted(name for name in model.skeleton.shapes if "norm" in name or "embed" in name)[:3])
        raise PlanError(
            f"{task.label}: `others` is {list(o.others)}, and no tensor of {model.source.model} is called so: name "
            f"some of its tensors, as {some or next(iter(model.skeleton.shapes))}"
        )
    own = {x.name for x in linears}
    coded = [x.name for x in resolved.linears if x.scheme.parts and x.name not in own and f"{x.name}.weight" in found]
    if coded:
        raise PlanError(
            f"{task.label}: `others` names {coded[0]}.weight, a linear that is stored as codes: have the step's "
            "`where` include it, or name fewer tensors"
        )


def _text(task: Task, positions: int | None, before: int) -> None:
    o = common(task.options)
    if o.data is not None and positions is not None and o.tokens + before > positions:
        more = f" after {before} positions of the step's own" if before else ""
        raise PlanError(
            f"{task.label}: samples of {o.tokens} tokens{more} are longer than the model's {positions}: set its option "
            f"`tokens` to at most {positions - before}"
        )
    for name in o.texts:
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


def notes(resolved: Resolved, model: Model, teacher: Model | None) -> tuple[str, ...]:
    """What a teacher of another size means, and which steps go block by block."""
    by_block = [x.label for x in resolved.at(Stage.TRAINING) if common(x.options).driver == "streamed"]
    told = (
        f"{' and '.join(by_block)} trains block by block with one of them in memory, which reads the model three times "
        "a step: several times slower than with all of it in memory.",
    )
    beside = tuple(
        f"The adapter in {model.source.folder / x} is not taken along: put it into the weights with `lilliput merge` "
        "first."
        for x in model.source.adapters()
    )
    return (*beside, *(told if by_block else ()), *_sizes(resolved, model, teacher))


def _sizes(resolved: Resolved, model: Model, teacher: Model | None) -> tuple[str, ...]:
    tasks = [task for task in resolved.at(Stage.TRAINING) if objective_of(task)[1].teaches]
    if not tasks:
        return ()
    by = unedited(model) if teacher is None else teacher
    own, other = parameters(model), parameters(by)
    if own > other:
        return (f"The student has {own / other:.2f} times the parameters of its teacher {by.source.model}.",)
    if own < SMALL * other:
        return (
            f"The student has {own / other:.1%} of the parameters of its teacher {by.source.model}, which students of "
            "two fifths of its size learn best from: train one in between first, and let that one be the teacher.",
        )
    return ()
