"""What training steps take: memory by phases, and files in the work folder."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lilliput.machine.cost import Cost, Phase
from lilliput.model.edited import unedited
from lilliput.model.weights import Model
from lilliput.plan import adapting
from lilliput.plan.objectives import objective_of, parameters, trained, widths
from lilliput.plan.resolve import Resolved
from lilliput.streaming.peak import Run
from lilliput.training.student import LOGITS
from lilliput.verbs.adapt import Adapt
from lilliput.verbs.spec import Stage, Task
from lilliput.verbs.train import Train, TrainOptions, common


def phases(resolved: Resolved, run: Run, model: Model, teacher: Model | None) -> tuple[Phase, ...]:
    """What training takes beyond its own steps: the teacher's pass over the text, and where it runs beside the student
    the whole of it, what both show, and copies of weights while the student writes."""
    found: list[Phase] = []
    by = unedited(model) if teacher is None else teacher
    for task in resolved.at(Stage.TRAINING):
        _, objective, options = objective_of(task)
        if _noted(task):
            found.append(Phase("taking the teacher's word", _noting(task, by, run)))
        if common(task.options).driver == "streamed":
            found.append(Phase("training block by block", streamed(resolved, task, run, model)))
            continue
        if isinstance(task.spec, Adapt):
            found.append(adapting.phase(resolved, task, run, model))
        elif common(task.options).others:
            found.append(Phase("training with what is outside the linears", Cost(ram=whole(task, run, model))))
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
        held = parameters(by) * run.itemsize
        writes = 0
        if objective.rolls(options):
            caches = 4 * 2 * o.batch * o.tokens * (size.blocks * size.student + size.teacher_blocks * size.teacher)
            writes = 4 * sum(x.linear.parameters for x in trained(resolved, task)) + caches
        own = found[-1].cost.ram if isinstance(task.spec, Adapt) else whole(task, run, model)
        found.append(Phase("training beside its teacher", Cost(ram=own + held + shown + writes)))
    return tuple(found)


def whole(task: Task, run: Run, model: Model) -> int:
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


def _noted(task: Task) -> bool:
    """Whether the teacher goes through the text before the first step, and what it says is kept."""
    _, objective, options = objective_of(task)
    return objective.teaches and (not objective.beside(options) or objective.prepare is not None)


def _noting(task: Task, teacher: Model, run: Run) -> Cost:
    """A teacher that goes through the text with one of its blocks in memory, or its head and a sample's logits; whole
    where rows may hold several documents, each with positions of its own. On disk lies what it says of each place, and
    the hidden states of two blocks."""
    skeleton, o, itemsize = teacher.skeleton, common(task.options), run.itemsize
    samples, tokens = (run.samples, run.tokens) if o.data is None else (o.steps * o.batch, o.tokens)
    sizes = {name: math.prod(shape) for name, shape in skeleton.shapes.items()}
    widest = max(sum(sizes[name] for name in skeleton.names_of(n)) for n in range(len(skeleton.block_names)))
    vocabulary = skeleton.shapes[skeleton.head][0]
    passing = 4 * 16 * tokens * skeleton.hidden_size
    head = 2 * itemsize * sizes[skeleton.head] + 4 * 5 * tokens * vocabulary
    ram = max(2 * itemsize * widest + 4 * passing, head)
    if _rows(o):
        ram = max(ram, itemsize * sum(sizes.values()) + 4 * passing + 4 * 5 * tokens * vocabulary)
    states = 2 * itemsize * skeleton.hidden_size
    return Cost(ram=ram, disk=samples * tokens * (_said(o, vocabulary) + states))


def _rows(o: TrainOptions) -> bool:
    """Whether a row of the text may hold several documents."""
    return o.documents or any(name.endswith(".jsonl") for name in o.texts)


def _said(o: TrainOptions, vocabulary: int) -> int:
    """Bytes of the teacher's word on a token: log-probabilities in float32 with their tokens, where those are not all,
    the rest and the next token's."""
    kept = vocabulary if o.top is None else min(o.top, vocabulary)
    return 4 * kept + 4 if kept == vocabulary else 8 * kept + 8


def _states(resolved: Resolved, task: Task, run: Run, model: Model) -> int:
    """Bytes of the file that a training with the whole model in memory goes on from, of the one before it, which leaves
    when it is whole, and of what has lost least so far; moments that lie on disk are in three sets of files."""
    o = common(task.options)
    if isinstance(task.spec, Adapt):
        count = adapting.numbers(resolved, task, run)
    else:
        count = sum(x.linear.parameters for x in trained(resolved, task))
        count += sum(math.prod(shape) for name, shape in model.skeleton.shapes.items() if o.trains(name))
    moments = {"adamw": 8, "paged": 0, "adamw-8bit": 3}[o.optimizer]
    states = 2 * (4 + moments) if o.steps > o.save else 0
    return count * (states + (2 * 4 if o.held_out else 0) + (3 * 8 if o.optimizer == "paged" else 0))


def disk(resolved: Resolved, chosen: Mapping[int, str], run: Run, model: Model, teacher: Model | None) -> int:
    """Bytes that training steps, one after the other, have in the work folder at its fullest."""
    by = unedited(model) if teacher is None else teacher
    most = 0
    for task in resolved.at(Stage.TRAINING):
        if chosen.get(task.step) == "streamed":
            own = streamed(resolved, task, run, model).disk
        else:
            own = _states(resolved, task, run, model)
        most = max(most, own + (_noting(task, by, run).disk if _noted(task) else 0))
    return most
