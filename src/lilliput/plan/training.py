"""What training steps ask of a plan: objectives that exist, and linears that they can train."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lilliput import methods
from lilliput.anatomy.tables import tables
from lilliput.data import load
from lilliput.data.documents import shares
from lilliput.data.tokens import vocabulary_of
from lilliput.errors import PlanError, SourceError
from lilliput.export import provenance
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
from lilliput.training.student import LOGITS
from lilliput.verbs.adapt import Adapt
from lilliput.verbs.objective import Objective, Widths
from lilliput.verbs.spec import Method, Stage, Task
from lilliput.verbs.train import Train, common

SMALL = 0.1  # of the teacher's parameters: below it, distillation falls short of a teacher in between


@dataclass(frozen=True)
class Driving:
    """How training steps are carried out. drivers: number of a step, and whether the model is trained "whole" or
    "streamed"; sharing: the steps whose weights processes share out; disk: bytes of the streamed ones in the work
    folder."""

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
            if teacher is not None and spec.restarts is not None and spec.restarts(spec.options_of(task)) is not None:
                adapting.original(task, model, teacher, linears)
        if common(task.options).shard:
            reason = unshared(resolved, task, model)
            if reason is not None:
                raise PlanError(f"{task.label} cannot be shared out over processes: {reason}")
        if common(task.options).driver == "streamed":
            reason = unstreamed(resolved, task, model)
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
            most = _whole(task, run, model)
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


def decided(resolved: Resolved, run: Run, model: Model, budget: int | None) -> tuple[Resolved, Driving]:
    """How training steps are carried out where a run may take `budget` bytes, and the steps with that in their
    options, to add up what they take."""
    shared = _sharing(resolved, model, run.processes)
    chosen = _drivers(_driven(resolved, {}, shared), run, model, budget)
    shared -= {step for step, driver in chosen.items() if driver == "streamed"}
    steps = _driven(resolved, chosen, shared)
    return steps, Driving(tuple(chosen.items()), shared, _disk(steps, chosen, run, model).disk)


def _text(task: Task, positions: int | None, before: int) -> None:
    o = common(task.options)
    if o.data is not None and positions is not None and o.tokens + before > positions:
        more = f" after {before} positions of the step's own" if before else ""
        raise PlanError(
            f"{task.label}: samples of {o.tokens} tokens{more} are longer than the model's {positions}: set its option "
            f"`tokens` to at most {positions - before}"
        )
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
        if common(task.options).driver == "streamed":
            found.append(Phase("training block by block", streamed(resolved, task, run, model)))
            if objective.teaches:
                found.append(Phase("taking the teacher's word", _noting(task, by, run.itemsize)))
            continue
        if isinstance(task.spec, Adapt):
            found.append(adapting.phase(resolved, task, run, model))
        elif common(task.options).others:
            found.append(Phase("training with what is outside the linears", Cost(ram=_whole(task, run, model))))
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
        own = found[-1].cost.ram if isinstance(task.spec, Adapt) else _whole(task, run, model)
        found.append(Phase("training beside its teacher", Cost(ram=own + whole + shown + writes)))
    return tuple(found)


def _whole(task: Task, run: Run, model: Model) -> int:
    """Bytes that a training step takes with the whole model in memory: those of its own, and gradients and moments of
    what `others` names."""
    o = common(task.options)
    moved = sum(math.prod(shape) for name, shape in model.skeleton.shapes.items() if o.trains(name))
    return max((x.cost.ram for x in task.phases(run)), default=0) + 12 * moved


def streamed(resolved: Resolved, task: Task, run: Run, model: Model) -> Cost:
    """What a training takes of which one block is in memory at a time, or the head. On disk lie what is trained, its
    moments, and copies of both to go on from; gradients; and the hidden states that enter each block."""
    o, spec = common(task.options), task.of(Train)
    rows = o.at_once or 1
    tokens = max(o.tokens, run.tokens) if o.data is None else o.tokens
    ram = 0
    for block in run.kinds:
        weights = sum(x.parameters for x in block.linears)
        largest = max(x.parameters for x in block.linears)
        widths = sum(x.out_features + x.in_features for x in block.linears)
        passing = 3 * 4 * rows * tokens * (widths + 8 * run.hidden)
        ram = max(ram, 4 * (spec.copies * weights + 6 * largest) + passing)
    vocabulary, width = model.skeleton.shapes[model.skeleton.head]
    moved = o.trains(model.skeleton.head)
    kept = vocabulary if o.top is None else min(o.top, vocabulary)
    logits = min(max(LOGITS, vocabulary), rows * tokens * vocabulary)
    head = vocabulary * width * (8 + (20 if moved else 0))
    head += 4 * 5 * logits + 12 * rows * tokens * kept + 4 * 8 * rows * tokens * width
    numbers = sum(x.linear.parameters for x in trained(resolved, task)) + moved * vocabulary * width
    states = 4 * o.batch * tokens * run.hidden * (len(run.blocks) + 2)
    return Cost(ram=max(ram, head), disk=9 * spec.copies * numbers + states)


def _noting(task: Task, teacher: Model, itemsize: int) -> Cost:
    """A teacher that goes through the text with one of its blocks in memory, or its head and a sample's logits."""
    skeleton, o = teacher.skeleton, common(task.options)
    sizes = {name: math.prod(shape) for name, shape in skeleton.shapes.items()}
    widest = max(sum(sizes[name] for name in skeleton.names_of(n)) for n in range(len(skeleton.block_names)))
    vocabulary = skeleton.shapes[skeleton.head][0]
    passing = 4 * 16 * o.tokens * skeleton.hidden_size
    head = 2 * itemsize * sizes[skeleton.head] + 4 * 5 * o.tokens * vocabulary
    return Cost(ram=max(2 * itemsize * widest + 4 * passing, head))


def _disk(resolved: Resolved, chosen: Mapping[int, str], run: Run, model: Model) -> Cost:
    """What streamed training steps have in the work folder, one after the other."""
    whole = Cost()
    for task in resolved.at(Stage.TRAINING):
        if chosen.get(task.step) == "streamed":
            whole = whole.then(Cost(disk=streamed(resolved, task, run, model).disk))
    return whole
