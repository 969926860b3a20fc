"""How the gates of an edit are trained, and what they and their training make of the weights that stay.

The whole model is in memory and runs with gates on its modules; the optimizer loop is that of training steps, so that a
run that is killed goes on from the last saved state.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lilliput.anatomy.model import Block
from lilliput.data import lessons as texts
from lilliput.data.lessons import Lessons
from lilliput.data.tokens import Tokens
from lilliput.errors import DataError, LilliputError, PlanError
from lilliput.machine import memory, ranks
from lilliput.model.edit import BRANCHES
from lilliput.model.edited import EditedModel
from lilliput.model.rotated import RotatedModel
from lilliput.model.stored import Model
from lilliput.plan import objectives as planning
from lilliput.plan.plan import Plan
from lilliput.progress import Progress
from lilliput.run import lessons as lessons_of
from lilliput.run import updating
from lilliput.run.journal import Work, save_atomically
from lilliput.run.teaching import noted
from lilliput.run.training import Place
from lilliput.training import loop
from lilliput.training.gates import Gates, after, attach, beside, columns
from lilliput.training.student import Student
from lilliput.training.text import Text
from lilliput.training.whole import Whole
from lilliput.verbs import edits
from lilliput.verbs.edit import Edit as EditSpec
from lilliput.verbs.edits import EditScores, Sizes, Units
from lilliput.verbs.gated import Training
from lilliput.verbs.objective import TokenIO
from lilliput.verbs.spec import Task
from lilliput.verbs.train import TrainOptions, common
from lilliput.verbs.trained import Trained


class GatedStudent(Student):
    """The model with its gates, which are what is trained."""

    def __init__(self, skeleton: Any, loss: Any, gates: Gates) -> None:
        super().__init__(skeleton, loss)
        self.gates = gates

    def cores(self) -> Mapping[str, Trained]:
        return {"gates": self.gates}


def trained(
    plan: Plan, task: Task, base: Model, units: tuple[Units, ...], sizes: Sizes, ids: Tensor | None, work: Work,
    progress: Progress,
) -> list[EditScores]:  # fmt: skip
    """Scores of all blocks from gates that are trained now, unless an earlier run has. Raises LilliputError."""
    spec = task.of(EditSpec)
    if spec.trained is None:
        raise RuntimeError(f"{task.label} trains no gates")
    wanted = spec.trained(units, sizes, task.options)
    gates = _gates(base, wanted, common(task.options).seed)
    place = _result(work, task)
    if not place.exists():
        if not any(r["step"] == task.step for r in work.find("edit-gates-begun")):
            # A run without records leaves nothing behind when it is stopped, and its states are worth keeping.
            work.note({"kind": "edit-gates-begun", "step": task.step})
        curve = _train(plan, task, base, gates, wanted, ids, work, progress)
        work.note({"kind": "edit-gates", "step": task.step, "curve": curve})
    with safe_open(place, "pt") as file:
        gates.load_state_dict({name: file.get_tensor(f"gates.{name}") for name in gates.state_dict()})
    return [_scores(gates, wanted, n) for n in range(wanted.blocks)]


def _result(work: Work, task: Task) -> Path:
    return work.folder / f"edit-{task.step:02d}-gates.safetensors"


def _gates(base: Model, wanted: Training, seed: int) -> Gates:
    adapters: dict[str, tuple[int, int]] = {}
    if wanted.width:
        anatomy = base.anatomy()
        for prefix, block in zip(anatomy.block_names, anatomy.blocks, strict=True):
            adapters |= {f"{prefix}.{x.name}": (x.out_features, x.in_features) for x in block.linears}
    return Gates(wanted, adapters, seed)


def _scores(gates: Gates, wanted: Training, block: int) -> EditScores:
    """How likely each unit is open, its branch and block with it."""
    found: dict[str, tuple[float, ...]] = {}
    with torch.no_grad():
        double = gates.double()
        for kind in wanted.counts:
            chance = double.chance(kind).detach()
            if kind == "hidden":
                if block == 0:
                    found[kind] = tuple(chance.tolist())
                continue
            own = chance[block]
            branch = "attention" if kind == "heads" else "mlp" if kind.startswith("channels") else ""
            if branch in wanted.counts:
                own = own * double.chance(branch)[block]
            found[kind] = tuple(own.reshape(-1).tolist())
        gates.float()
    return found


def _train(
    plan: Plan, task: Task, base: Model, gates: Gates, wanted: Training, ids: Tensor | None, work: Work,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    o = common(task.options)
    _, objective, options = planning.objective_of(task)
    if objective.tokens_loss is None:
        raise RuntimeError("the plan should have refused an objective of features")
    tokens_loss = objective.tokens_loss
    lessons = _lessons(plan, task, base, ids)
    notes = None
    if objective.teaches:
        notes = noted(base, lessons, o.top, objective.temperature(options), None, work, progress)

    def loss(io: TokenIO) -> Tensor:
        return tokens_loss(io, options)

    names = tuple(base.skeleton.shapes)
    base.load(names)
    student = GatedStudent(base.skeleton, loss, gates.to(plan.device))
    place = Place(lessons_of.folder(work) / f"edit-{task.step:02d}-training")
    place.folder.mkdir(exist_ok=True)
    try:
        with attached(base, gates, wanted):
            text = Text(lessons, None if notes is None else notes.taught)
            own = _with_weights(base, wanted, o)
            curve = loop.train(Whole(student, text, own, place), lessons, own, progress)
        kept = {f"gates.{name}": x.detach().cpu().contiguous() for name, x in gates.state_dict().items()}
        kept |= {f"weight.{x}": base.skeleton.tensor(x).detach().cpu().contiguous() for x in _changed(base, wanted)}
    finally:
        base.unload(names)
        if notes is not None:
            notes.close()
    if not all(bool(x.isfinite().all()) for x in kept.values()):
        raise LilliputError(f"{task.label}: gates or weights are not finite after training: lower gate_lr and lr")
    save_atomically(_result(work, task), kept)
    ranks.met()
    if ranks.lead():
        shutil.rmtree(place.folder, ignore_errors=True)
    for path in work.folder.glob("taught-*"):
        path.unlink()
    gates.cpu()
    memory.trim()
    return asdict(curve)


def _lessons(plan: Plan, task: Task, base: Model, ids: Tensor | None) -> Lessons:
    o = common(task.options)
    if o.data is None:
        if ids is None:
            raise DataError(f"{task.label} has no text: name one with --data or its option `data`")
        return texts.whole(ids, Tokens.of(ids, "calibration").source)
    return texts.read(
        o.data,
        base.source.tokenizer(),
        samples=o.steps * o.batch,
        tokens=o.tokens,
        vocabulary=base.vocabulary,
    )


def _linears(base: Model) -> Iterator[tuple[int, str, Block]]:
    anatomy = base.anatomy()
    for number, (prefix, block) in enumerate(zip(anatomy.block_names, anatomy.blocks, strict=True)):
        yield number, prefix, block


def _changed(base: Model, wanted: Training) -> list[str]:
    """The tensors of the blocks' linears that are trained themselves."""
    if not wanted.weights:
        return []
    return [f"{prefix}.{x.name}.weight" for _, prefix, block in _linears(base) for x in block.linears]


def _with_weights(base: Model, wanted: Training, o: TrainOptions) -> TrainOptions:
    return o.model_copy(update={"others": (*o.others, *_changed(base, wanted))})


@contextmanager
def attached(base: Model, gates: Gates, wanted: Training) -> Iterator[None]:
    """The base's loaded modules with gates and adapters on them."""
    handles: list[Any] = []
    try:
        for number, prefix, block in _linears(base):
            module = base.skeleton.block(number)
            handles += attach(gates, module, number, edits.readers_of(block), branches_of(block))
            if wanted.width:
                for x in block.linears:
                    hook = beside(gates, f"{prefix}.{x.name}")
                    handles.append(module.get_submodule(x.name).register_forward_hook(hook))
            if "hidden" in wanted.counts:
                for name in block.residual_writers:
                    handles.append(module.get_submodule(name).register_forward_hook(after(gates)))
        if "hidden" in wanted.counts:
            if not isinstance(base, RotatedModel):
                raise RuntimeError("gates of residual channels need a model whose norms' gains are in its linears")
            for name in base.outside.embeddings:
                module = base.skeleton.model.get_submodule(name.rpartition(".")[0])
                handles.append(module.register_forward_hook(after(gates)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def branches_of(block: Block) -> dict[str, str]:
    """By linear that writes to the residual stream, its branch."""
    return {x.name: branch for branch, roles in BRANCHES.items() for x in block.linears if x.role in roles}


def fold(plan: Plan, task: Task, level: EditedModel, work: Work, wanted: Training) -> None:
    """Write the weights of what stays, with their gates in them and what was trained beside: a file for each block, and
    its record. level: the edit as it was decided."""
    known = {int(r["block"]) for r in work.find("edit-update") if r["step"] == task.step}
    place = _result(work, task)
    if len(known) < len(level.edit.blocks):
        base, gates = level.base, _gates(level.base, wanted, common(task.options).seed)
        with safe_open(place, "pt") as file, torch.no_grad():
            gates.load_state_dict({name: file.get_tensor(f"gates.{name}") for name in gates.state_dict()})
            for new, number in enumerate(level.edit.blocks):
                if number in known:
                    continue
                linears = _folded(level, gates, wanted, new, number, file)
                digest = updating.write(base, number, linears, work, task.step)
                work.note({"kind": "edit-update", "step": task.step, "block": number, "sha256": digest})
    place.unlink(missing_ok=True)


def _folded(level: EditedModel, gates: Gates, wanted: Training, new: int, number: int, file: Any) -> dict[str, Tensor]:
    """The linears of a block, float32 [out, in], as they stay."""
    base = level.base
    block, prefix = base.anatomy().blocks[number], base.skeleton.block_names[number]
    readers, branches, linears = edits.readers_of(block), branches_of(block), {}
    changed = set(_changed(base, wanted))

    def value(kind: str, n: int) -> Tensor:
        return gates.final(kind)[n]

    for x in block.linears:
        name = f"{prefix}.{x.name}.weight"
        weight = file.get_tensor(f"weight.{name}") if name in changed else base.read(name)
        weight = (weight.T if x.transposed else weight).float()
        change = gates.change(f"{prefix}.{x.name}")
        weight = weight if change is None else weight + change
        kinds = {kind: owner[x.name] for kind, owner in readers.items() if kind in wanted.counts and x.name in owner}
        if kinds or x.name in branches:
            weight = weight * columns(gates, number, kinds, branches.get(x.name), value)
        fresh = f"{level.skeleton.block_names[new]}.{x.name}.weight"
        for axis in (0, 1):
            index = level.kept(fresh, axis)
            if index is not None:
                weight = weight.index_select(axis ^ int(x.transposed), index)
        linears[x.name] = weight.contiguous()
    return linears


def refuse(task: Task, base: Model) -> None:
    """Raises PlanError for a model whose gates cannot be trained as one, and for what cannot be minimised by gates."""
    if base.source.quantization is not None:
        raise PlanError(
            f"{task.label} trains gates on plain weights, and {base.source.model} is quantized: take the model that it "
            "was made of"
        )
    if common(task.options).driver == "streamed":
        raise PlanError(f"{task.label} trains gates with the whole model in memory: leave out its option `driver`")
    method, objective, options = planning.objective_of(task)
    if objective.tokens_loss is None or objective.beside(options) or objective.prepare or objective.weigh:
        raise PlanError(
            f"{task.label}: {method.name} asks for more than a teacher's distributions, and gates are trained by those "
            "alone: choose logit-kd, divergence-kd or cross-entropy"
        )
