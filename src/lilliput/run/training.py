"""Training steps of a run: the finished folder is read as layers, trained, and written again beside itself.

The folder is exchanged by rename once a record of the journal says that the trained one is whole, so that a run that is
killed at any moment goes on from the last saved state, or from the exchange.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import safe_open
from torch import Tensor

from lilliput import export
from lilliput.data.tokens import Tokens
from lilliput.errors import LilliputError
from lilliput.export.outcome import Outcome
from lilliput.export.provenance import DataRow, TrainingRow
from lilliput.formats.integer import IntegerFormat, IntegerGrid
from lilliput.machine import memory, ranks
from lilliput.model.stored import Model, open_model
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.plan import objectives as planning
from lilliput.plan.plan import Plan
from lilliput.plan.resolve import LinearPlan
from lilliput.progress import Progress
from lilliput.run import adapting
from lilliput.run import lessons as texts
from lilliput.run.journal import Work, save_atomically
from lilliput.run.output import Output
from lilliput.run.teaching import Teaching, teaching
from lilliput.source import layers
from lilliput.source.source import own_name
from lilliput.training import loop, sharding, streamed
from lilliput.training.adapted import Adapted
from lilliput.training.streamed import Streamed
from lilliput.training.student import Student
from lilliput.training.text import Text
from lilliput.training.whole import Whole
from lilliput.verbs.adapt import Adapt
from lilliput.verbs.spec import Stage, Task
from lilliput.verbs.train import Train, common
from lilliput.verbs.trained import Trained

TRAINED = "trained"  # kind of record, and begins the name of the folder that takes the place of the finished one


@dataclass(frozen=True)
class Place:
    """The folder of a training step's files, of all processes."""

    folder: Path

    def load(self, name: str) -> Mapping[str, Tensor] | None:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        save_atomically(self.folder / f"{name}.safetensors", tensors)


def pending(plan: Plan, work: Work) -> tuple[Task, ...]:
    """The training steps that are not done."""
    done = {int(x["step"]) for x in work.find(TRAINED)}
    return tuple(task for task in plan.resolved.at(Stage.TRAINING) if task.step not in done)


def rows(work: Work) -> tuple[TrainingRow, ...]:
    """What is known of the training steps that are done."""
    return tuple(TypeAdapter(TrainingRow).validate_python(x["row"]) for x in work.find(TRAINED))


def begun(work: Work) -> bool:
    """Whether the folder is no longer what the block loop has written: a training step has taken its place."""
    return bool(work.find(TRAINED))


def exchange(work: Work) -> None:
    """Put the trained folder in place of the finished one, where a record says that it is whole."""
    ranks.met()  # nobody reads the finished one any more
    for record in work.find(TRAINED) if ranks.lead() else ():
        fresh = _fresh(work, int(record["step"]))
        if fresh.exists():
            shutil.rmtree(work.staging, ignore_errors=True)
            fresh.rename(work.staging)
    ranks.met()


def _fresh(work: Work, step: int) -> Path:
    return work.partial / f"{TRAINED}-{step}"


def train(plan: Plan, taught_by: Model, tokens: Tokens | None, work: Work, progress: Progress) -> None:
    """Carry out the training steps that are left on the folder `work.staging`, which opens like any model.

    taught_by: the teacher. tokens: the calibration windows, for steps that name no text of their own. Raises
    LilliputError.
    """
    exchange(work)
    for task in pending(plan, work):
        fresh = _fresh(work, task.step)
        if ranks.lead():
            shutil.rmtree(fresh, ignore_errors=True)
        memory.trim()
        row, hashes = _one(plan, task, taught_by, tokens, work, fresh, progress)
        record = {"kind": TRAINED, "step": task.step, "sha256": hashes}
        work.note(record | {"row": asdict(row)})
        exchange(work)
        for path in work.folder.glob("taught-*"):
            path.unlink()
        if ranks.lead():
            shutil.rmtree(_place(work, task).folder, ignore_errors=True)


def _place(work: Work, task: Task) -> Place:
    folder = texts.folder(work) / f"training-{task.step}"
    folder.mkdir(exist_ok=True)
    return Place(folder)


def _one(
    plan: Plan, task: Task, taught_by: Model, tokens: Tokens | None, work: Work, fresh: Path, progress: Progress
) -> tuple[TrainingRow, dict[str, str]]:
    o = common(task.options)
    _, objective, _ = planning.objective_of(task)
    model = open_model(work.staging, device=plan.device)
    lessons = texts.of(plan, task, model, taught_by, tokens, work)
    if _streamed(plan, task):
        streamed.refuse(lessons)
    with teaching(task, model, taught_by, lessons, work, progress) as taught:
        place = _place(work, task)
        student: Student | None = None
        if _streamed(plan, task):
            trainer: loop.Trainer = _by_block(plan, task, model, taught_by, taught, place)
        else:
            made = adapting.student if isinstance(task.spec, Adapt) else _student
            student = made(plan, task, model, taught_by, taught)
            trainer = _as_whole(task, student, model, taught, place, progress)
        curve = loop.train(trainer, lessons, o, progress)
    samples, tokens_each = lessons.ids.shape
    row = TrainingRow(
        method=task.method.name,
        objective=o.objective,
        optimizer=o.optimizer,
        data=DataRow(own_name(lessons.source), samples, tokens_each, lessons.fingerprint),
        teacher=taught_by.source.name if objective.teaches else None,
        losses=tuple(float(f"{x:.6g}") for x in curve.losses),
        held_out=tuple((n, float(f"{x:.6g}")) for n, x in curve.held_out),
        steps=len(curve.losses) if curve.kept is None else curve.kept,
        seconds=round(curve.seconds, 3),
        stopped=curve.stopped,
    )
    if isinstance(student, Adapted):
        return replace(row, adapter=adapting.written(task, student, work.staging, fresh)), {}
    return row, _written(plan, trainer, work.staging, fresh)


def _streamed(plan: Plan, task: Task) -> bool:
    return plan.driving.streamed(task.step)


def _as_whole(
    task: Task, student: Student, model: Model, taught: Teaching, place: Place, progress: Progress
) -> loop.Trainer:
    texts.separate(model, taught.lessons, model.source.model)
    text = taught.text(student, model)
    if place.load("state") is None:
        taught.open_maps(student, text, task, progress)
    return Whole(student, text, common(task.options), place)


def _by_block(plan: Plan, task: Task, model: Model, before: Model, taught: Teaching, place: Place) -> loop.Trainer:
    if taught.loss is None or (taught.notes is None and taught.spec.teaches):
        raise RuntimeError(f"{task.label} compares more than distributions, which the plan should have refused")
    blocks: dict[int, list[LinearPlan]] = {}
    for x in planning.trained(plan.resolved, task):
        blocks.setdefault(x.block, []).append(x)

    def build(block: int) -> dict[str, Trained]:
        return {x.name: _core(plan, task, model, before, x) for x in blocks.get(block, ())}

    text = Text(taught.lessons, None if taught.notes is None else taught.notes.taught)
    return Streamed(model, build, taught.loss, text, common(task.options), place)


def _student(plan: Plan, task: Task, model: Model, before: Model, taught: Teaching) -> Student:
    skeleton = model.skeleton
    chosen = {f"{x.name}.weight": x for x in planning.trained(plan.resolved, task)}
    checkpointing = common(task.options).checkpointing
    student = Student(skeleton, taught.loss, taught.compared, checkpointing=checkpointing)
    inside: set[str] = set()
    for number in range(len(skeleton.block_names)):
        names = skeleton.names_of(number)
        inside |= set(names)
        model.load(name for name in names if name not in chosen)
        for x in (chosen[name] for name in names if name in chosen):
            student.place(x.name, _core(plan, task, model, before, x))
        if task.step in plan.driving.sharing:
            sharding.share_block(student, number)
            memory.trim()
    model.load(name for name in skeleton.shapes if name not in inside)
    return student


def _core(plan: Plan, task: Task, model: Model, before: Model, x: LinearPlan) -> Trained:
    """What is trained of a linear, as it is before the training."""
    outcome = plan.outcomes[x.name]
    rows, width = outcome.out_features, outcome.in_features
    layer = layers.layer(model.source, outcome.stored, x.name, rows, width, transposed=outcome.transposed)
    known = f"{x.name}.weight" in before.refs and before.shape(f"{x.name}.weight") == outcome.dense_shape
    original = before.read(f"{x.name}.weight").float() if known else layer.weight
    layer = _as_planned(layer, outcome)
    if x.sparsity is not None:  # an earlier step has pruned it: what is 0 now stays 0
        layer = replace(layer, support=layer.decode() != 0)
    core = task.of(Train).begin(layer, original.T if outcome.transposed and known else original, task.options)
    core.planned(outcome.kept, outcome.pattern)
    return core.to(plan.device)


def _as_planned(layer: Layer, outcome: Outcome) -> Layer:
    """With the plan's word for its integers: engines' layouts do not tell a row that is one group from a group as wide
    as the row, and repeat what a matrix shares for every row."""
    planned = outcome.scheme.integer
    if planned is None or len(layer.parts) != 1:
        return layer
    (part,) = layer.parts
    width = layer.weight.shape[1]
    if not isinstance(part, QuantizedPart) or not isinstance(part.format, IntegerFormat) or part.format == planned:
        return layer
    if planned.groups(width) != part.format.groups(width):
        return layer
    if replace(part.format, group_size=planned.group_size) != planned:
        return layer
    grid = part.grid
    if planned.group_size == 0:
        if bool((grid.scale != grid.scale[:1]).any()):
            return layer
        grid = IntegerGrid(grid.scale[:1], None if grid.zero is None else grid.zero[:1])
    return replace(layer, parts=(replace(part, format=planned, grid=grid),))


def _written(plan: Plan, trainer: loop.Trainer, folder: Path, fresh: Path) -> dict[str, str]:
    """The folder `folder` again as `fresh`, with what was trained in its place; sha256 (hex) of each changed tensor."""
    exporter = export.get(plan.exporter)
    names: dict[str, list[str]] = {}
    for x in plan.tensors:
        names.setdefault(x.source, []).append(x.name)
    kinds = {name: dtype for contents in plan.files.values() for name, (dtype, _) in contents.items()}
    output = Output(fresh, plan.files)
    if ranks.lead():
        fresh.mkdir()
        for path in sorted(folder.iterdir()):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, fresh / path.name)
        output.take_up({})
    hashes: dict[str, str] = {}
    for owner, result in trainer.results():  # which all processes go through together
        if not ranks.lead():
            continue
        if isinstance(result, Layer):
            tensors = dict(exporter.pack(plan.outcomes[owner], result))
        else:
            tensors = {name: result.to(kinds[name]) for name in names[owner]}
        for name in names[owner]:
            value = tensors[name].cpu().contiguous()
            if not bool(value.isfinite().all()):
                raise LilliputError(f"{name} is not finite after training: lower lr")
            hashes |= output.write([name], {name: [value]}.__getitem__)
    return hashes
