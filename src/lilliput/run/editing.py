"""How the verb `edit` is carried out: the model as planned, with the sizes that will stay; scores; what stays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lilliput.anatomy.model import Block
from lilliput.anatomy.setting import setting
from lilliput.machine import memory, ranks
from lilliput.model import rotated
from lilliput.model.block import BlockWeights
from lilliput.model.edited import Edit, EditedModel, views
from lilliput.model.rotated import RotatedModel
from lilliput.model.stored import Model
from lilliput.plan.plan import Plan
from lilliput.plan.resolve import ordered
from lilliput.progress import Progress
from lilliput.recipe.schema import Recipe
from lilliput.run import gating, timing, updating
from lilliput.run.journal import Losses, Work
from lilliput.stats.routing import Routing
from lilliput.stats.site import SiteStats
from lilliput.streaming import backward, branches, routing
from lilliput.streaming.backward import Samples
from lilliput.streaming.collect import collect
from lilliput.streaming.forward import through
from lilliput.streaming.walk import Flow, Passage, walk
from lilliput.streaming.watched import Watched
from lilliput.verbs import edits
from lilliput.verbs.edit import Edit as EditSpec
from lilliput.verbs.edits import EditIO, EditScores, EditView, Units
from lilliput.verbs.spec import Task
from lilliput.verbs.timing import Times, Timing


def prepared(model: Model, recipe: Recipe, data: str = "self") -> Model:
    """The model as the steps of a recipe will find it: of the sizes that its edits leave, with the first of everything
    in place of what they will choose, and ready to be rotated where a step learns a rotation. data: calibration text.

    Raises PlanError where an edit has no place in a config of the model's architecture, or among the other steps.
    """
    for task in ordered(recipe):
        if isinstance(task.spec, EditSpec):
            units = _units(model)
            edit = edits.first_of(units, task.spec.sizes(units, task.options))
            wanted = task.spec.timed(task.options) if task.spec.timed is not None else None
            if wanted is not None:
                timing.refuse(wanted)
            if task.spec.trained is not None:
                gating.refuse(task, model)
                task.spec.trained(units, task.spec.sizes(units, task.options), task.options)
            if task.spec.asks(task.spec.narrows, task.options):
                model = rotated.ready(model)
            if task.spec.vocabulary is not None:
                edit = replace(edit, vocabulary=task.spec.vocabulary(model.source, data, task.options))
            model = EditedModel(model, edit)
        elif task.spec.turns:
            model = rotated.ready(model)
    return model


def _units(model: Model) -> tuple[Units, ...]:
    queries = setting(model.skeleton.config, "num_attention_heads", 0)
    return edits.units_of(model.anatomy(), model.skeleton.hidden_size, int(queries or 1))


def edited(plan: Plan, task: Task, model: Model, ids: Tensor | None, work: Work, progress: Progress) -> Model:
    """The model with what the step leaves, decided now unless an earlier run did. ids [N, T] are all samples."""
    if not any(r["step"] == task.step for r in work.find("edit")):
        level = _level(plan, task, model)
        edit = _decided(plan, task, level, ids, work, progress) if ranks.lead() else level.edit
        work.note({"kind": "edit", "step": task.step, "edit": edit.plain()})
    if task.of(EditSpec).asks(task.of(EditSpec).updates, task.options):
        _update(plan, task, _level(plan, task, model).base, ids, work, progress)
    if task.of(EditSpec).trained is not None:
        _fold(plan, task, _level(plan, task, model), work)
    return _recorded(plan, task, model, work)


def again(plan: Plan, model: Model, work: Work) -> Model:
    """The model with what all edits have left, from the journal of a run whose blocks are finished."""
    for task in plan.resolved.of(EditSpec):
        model = _recorded(plan, task, model, work)
    return model


def _recorded(plan: Plan, task: Task, model: Model, work: Work) -> Model:
    (record,) = [r for r in work.find("edit") if r["step"] == task.step]
    level = _level(plan, task, model)
    settled = level.with_edit(Edit.from_plain(record["edit"]))
    updates = {x["block"]: x["sha256"] for x in work.find("edit-update") if x["step"] == task.step}
    return replaced(model, level, updating.read(settled, work, task.step, updates))


def _level(plan: Plan, task: Task, model: Model) -> EditedModel:
    """The edited model of a step."""
    number = [x.step for x in plan.resolved.of(EditSpec)].index(task.step)
    return [x for x in views(model) if isinstance(x, EditedModel)][::-1][number]


def turned(model: Model) -> RotatedModel:
    """The view of a model that is turned, whatever rests on it. Raises PlanError where nothing of it can be."""
    return next((x for x in views(model) if isinstance(x, RotatedModel)), None) or rotated.ready(model)


def replaced(model: Model, old: Model, new: Model) -> Model:
    """The model with another view in place of one that it rests on."""
    if model is old:
        return new
    if not isinstance(model, EditedModel | RotatedModel):
        raise RuntimeError("the model rests on no such edit")
    return model.over(replaced(model.base, old, new))


def _decided(plan: Plan, task: Task, level: EditedModel, ids: Tensor | None, work: Work, progress: Progress) -> Edit:
    spec, base = task.of(EditSpec), level.base
    if spec.vocabulary is not None:
        return level.edit
    units = _units(base)
    sizes = spec.sizes(units, task.options)
    if spec.loss is not None:
        with _Skipping(plan, task, base, ids, work, progress) as skipping:
            chosen = spec.loss(skipping.loss, units, sizes, task.options)
            if chosen is not None:
                return chosen
    wanted = spec.timed(task.options) if spec.timed is not None else None
    if wanted is not None:
        sizes = replace(sizes, times=_times(task, base, wanted, work))
    if spec.trained is not None:
        scores: Sequence[EditScores] = _gated(plan, task, base, ids, work, progress)
    else:
        scores = _scored(plan, task, base, ids, work, progress) if spec.score is not None else []
    return spec.run(scores, units, sizes, task.options)


def _fold(plan: Plan, task: Task, level: EditedModel, work: Work) -> None:
    spec, units = task.of(EditSpec), _units(level.base)
    if spec.trained is None:
        raise RuntimeError(f"{task.label} trains no gates")
    (record,) = [r for r in work.find("edit") if r["step"] == task.step]
    wanted = spec.trained(units, spec.sizes(units, task.options), task.options)
    gating.fold(plan, task, level.with_edit(Edit.from_plain(record["edit"])), work, wanted)


def _times(task: Task, base: Model, wanted: Timing, work: Work) -> Times:
    """What blocks take at other widths: a record, so that a resumed run decides by the same times."""
    if not any(r["step"] == task.step for r in work.find("edit-times")):
        plain = [
            {key: [[n, time] for n, time in x.items()] for key, x in block.items()}
            for block in timing.table(base, wanted)
        ]
        work.note({"kind": "edit-times", "step": task.step, "device": wanted.device, "blocks": plain})
    (record,) = [r for r in work.find("edit-times") if r["step"] == task.step]
    return [{key: {int(n): int(t) for n, t in x} for key, x in block.items()} for block in record["blocks"]]


def _looked_at(plan: Plan, task: Task, ids: Tensor | None) -> Tensor:
    if ids is None:
        raise RuntimeError("an edit was planned from calibration, but there are no tokens")
    looked_at = task.of(EditSpec).looked_at
    return ids if looked_at is None else ids[: looked_at(len(ids), task.options)]


def _scored(
    plan: Plan, task: Task, base: Model, ids: Tensor | None, work: Work, progress: Progress
) -> Sequence[EditScores]:
    """Scores of all blocks, each a record of the journal."""
    known = {int(r["block"]): r for r in work.find("edit-score") if r["step"] == task.step}
    count = len(base.skeleton.block_names)
    if len(known) < count:
        if task.of(EditSpec).slopes(task.options):
            _from_gradients(plan, task, base, ids, work, progress, known)
        else:
            _from_blocks(plan, task, base, ids, work, progress, known)
    records = {int(r["block"]): r["scores"] for r in work.find("edit-score") if r["step"] == task.step}
    return [{key: tuple(values) for key, values in records[n].items()} for n in range(count)]


def _gated(
    plan: Plan, task: Task, base: Model, ids: Tensor | None, work: Work, progress: Progress
) -> Sequence[EditScores]:
    """Scores of all blocks from trained gates, whose file a killed run has left behind if it had come so far."""
    units = _units(base)
    sizes = task.of(EditSpec).sizes(units, task.options)
    return gating.trained(plan, task, base, units, sizes, ids, work, progress)


def _note(task: Task, block: int, scores: EditScores, work: Work, hidden: Any = None) -> None:
    plain = {key: list(values) for key, values in scores.items()}
    work.note({"kind": "edit-score", "step": task.step, "block": block, "scores": plain, "hidden": hidden})


def _view(base: Model, block: int) -> EditView:
    anatomy = base.anatomy().blocks[block]
    weights = BlockWeights(base, block, anatomy)
    return EditView(anatomy, lambda name: weights.linear(anatomy.linear(name)).to(weights.device))


def _from_blocks(
    plan: Plan,
    task: Task,
    base: Model,
    ids: Tensor | None,
    work: Work,
    progress: Progress,
    known: Mapping[int, Any],
) -> None:
    spec = task.of(EditSpec)
    sizes = spec.sizes(_units(base), task.options)
    count, start = len(base.skeleton.block_names), len(known)
    stem = f"edit-{task.step:02d}"
    for path in work.folder.glob(f"{stem}-*.bin"):
        if path.name != f"{stem}-{start:04d}.bin":
            path.unlink()  # of a run killed between a record and its tidying
    flow: Flow | None = None
    routed = spec.sees_routing(task.options)
    if task.needs or spec.looks_alike(task.options) or spec.asks(spec.branches, task.options) or routed:
        flow = Flow(_looked_at(plan, task, ids), plan.batching.batch, work.folder, stem, plan.dtype)
    progress.step(start, count, "scoring what may leave")
    recorded = known[start - 1]["hidden"] if start else None
    with torch.no_grad():
        for passage in walk(base, flow, first=start, recorded=recorded):
            stats, used = _statistics(base, passage, task.needs, routed)
            alike = _similarity(passage) if spec.looks_alike(task.options) else None
            adds = _branches(base, passage) if spec.asks(spec.branches, task.options) else {}
            base.unload_block(passage.block)
            view = _view(base, passage.block)
            io = EditIO(stats, {}, {}, alike, routing=used, sizes=sizes, branches=adds)
            scores = spec.score(view, io, task.options) if spec.score is not None else {}
            del view
            _note(task, passage.block, scores, work, passage.checksum())
            progress.step(passage.block + 1, count, "scoring what may leave")


def _statistics(
    base: Model, passage: Passage, needs: frozenset[str], routed: bool
) -> tuple[Mapping[str, SiteStats], Routing | None]:
    """Of a pass through a block: statistics of its sites and, where a score reads it, how its experts were used."""
    if passage.batches is None or passage.inputs is None:
        return {}, None
    block: Block = base.anatomy().blocks[passage.block]
    runs = through(base.skeleton, passage.block, passage.batches, passage.inputs, passage.outputs)
    with routing.watched(base.skeleton, passage.block, block) if routed else nullcontext() as seen:
        stats = collect(base.skeleton, passage.block, block.sites, {x.name: needs for x in block.sites}, runs)
    return stats, None if seen is None else seen.routing


def _branches(base: Model, passage: Passage) -> Mapping[str, float]:
    if passage.batches is None or passage.inputs is None or passage.outputs is None:
        raise RuntimeError("branches were planned without hidden states")
    block = base.anatomy().blocks[passage.block]
    return branches.added(base.skeleton, passage.block, block, passage.batches, passage.inputs, passage.outputs)


def _similarity(passage: Passage) -> float:
    """The mean over tokens of the cosine between what enters a block and what leaves it."""
    if passage.inputs is None or passage.outputs is None:
        raise RuntimeError("similarity was planned without hidden states")
    total, tokens = 0.0, 0
    for n in range(len(passage.inputs)):
        before, after = passage.inputs.read(n, n + 1).float(), passage.outputs.read(n, n + 1).float()
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        total, tokens = total + float(cosine.sum(dtype=torch.float64)), tokens + cosine.numel()
    return total / max(tokens, 1)


def _from_gradients(
    plan: Plan,
    task: Task,
    base: Model,
    ids: Tensor | None,
    work: Work,
    progress: Progress,
    known: Mapping[int, Any],
) -> None:
    """Scores from the last block to the first."""
    spec = task.of(EditSpec)
    sizes = spec.sizes(_units(base), task.options)

    def scored(block: int, view: EditView, io: EditIO) -> None:
        scores = spec.score(view, replace(io, sizes=sizes), task.options) if spec.score is not None else {}
        _note(task, block, scores, work)

    _backward(plan, task, base, ids, work, progress, known, scored, "gradients for what may leave")


def _update(plan: Plan, task: Task, base: Model, ids: Tensor | None, work: Work, progress: Progress) -> None:
    """Weights of what stays, from the last block to the first, each a file of the work folder with its record."""
    spec = task.of(EditSpec)
    (record,) = [r for r in work.find("edit") if r["step"] == task.step]
    edit = Edit.from_plain(record["edit"])
    known = {int(r["block"]): r for r in work.find("edit-update") if r["step"] == task.step}

    def updated(block: int, view: EditView, io: EditIO) -> None:
        stays = {"heads": edit.heads[block]} if block in edit.heads else {}
        stays |= {f"channels.{m}": kept for (n, m), kept in edit.channels.items() if n == block}
        linears = {} if spec.update is None else spec.update(view, io, stays, task.options)
        digest = updating.write(base, block, linears, work, task.step)
        work.note({"kind": "edit-update", "step": task.step, "block": block, "sha256": digest})

    if len(known) < len(base.skeleton.block_names):
        _backward(plan, task, base, ids, work, progress, known, updated, "gradients for what stays")


def _backward(
    plan: Plan,
    task: Task,
    base: Model,
    ids: Tensor | None,
    work: Work,
    progress: Progress,
    known: Collection[int],
    handle: Callable[[int, EditView, EditIO], None],
    what: str,
) -> None:
    """Hand over what a backward pass shows of each block, from the last to the first; a pass that was interrupted
    begins anew and skips known blocks."""
    spec, skeleton = task.of(EditSpec), base.skeleton
    samples = Samples(_looked_at(plan, task, ids), work.folder, progress)
    backward.tidy(work.folder)
    number, count = len(samples.ids), len(skeleton.block_names)
    seen: dict[int, Watched] = {}

    def watch(block: int) -> Watched | None:
        if block in known or not spec.watches(task.options):
            return None
        anatomy = base.anatomy().blocks[block]
        seen[block] = Watched(
            skeleton,
            block,
            anatomy,
            scale=number,  # the loss is the mean over samples
            gates=edits.readers_of(anatomy) if spec.asks(spec.gates, task.options) else {},
            needs=task.needs,
            outputs=edits.linears_of(anatomy) if spec.asks(spec.outputs, task.options) else (),
        )
        return seen[block]

    progress.step(len(known), count, what)
    with torch.enable_grad():
        weights = spec.asks(spec.gradients, task.options)
        for place in backward.backward(skeleton, base.read, samples, squares=weights, watch=watch):
            if place.block is None or place.block in known:
                continue
            prefix, anatomy = skeleton.block_names[place.block], base.anatomy().blocks[place.block]
            with torch.no_grad():
                turned = partial(_turned, prefix=prefix)
                linears = anatomy.linears if weights else ()
                slopes = {x.name: turned(place.tensors, x) for x in linears}
                # Squares are of each sample's share of the loss.
                squares = {x.name: turned(place.squares, x) * number for x in linears}
                view = _view(base, place.block)
                io = EditIO({}, slopes, squares)
                if (watched := seen.pop(place.block, None)) is not None:
                    io = EditIO(watched.stats(), slopes, squares, gates=watched.gates(), outputs=watched.outputs())
                    del watched
                handle(place.block, view, io)
                del slopes, squares, view, io
            progress.step(count - place.block, count, what)
    memory.trim()


def _turned(tensors: Mapping[str, Tensor], linear: Any, *, prefix: str) -> Tensor:
    value = tensors[f"{prefix}.{linear.name}.weight"]
    return value.T if linear.transposed else value


class _Skipping:
    """Losses of the base without some of its blocks."""

    def __init__(self, plan: Plan, task: Task, base: Model, ids: Tensor | None, work: Work, progress: Progress) -> None:
        self._base, self._progress = base, progress
        self._samples = Samples(_looked_at(plan, task, ids), work.folder)
        self._losses = Losses(work, "edit-loss", task.step)
        self._stack = ExitStack()
        self._again: Any = None

    def __enter__(self) -> _Skipping:
        backward.tidy(self._samples.folder)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def loss(self, skipped: Collection[int]) -> float:
        """See `SkipLoss`. What a block adds to the residual stream is taken from it, which is what deleting it does."""
        value = self._losses.next(lambda: self._measured(frozenset(skipped)))
        self._progress.step(self._losses.asked, self._losses.asked, "losses without blocks")
        return value

    def _measured(self, skipped: frozenset[int]) -> float:
        if self._again is None:
            losses = backward.losses(self._base.skeleton, self._base.read, self._samples)
            self._again = self._stack.enter_context(losses)
        silent = self._silenced(skipped)

        def read(name: str) -> Tensor:
            value = self._base.read(name)
            return torch.zeros_like(value) if name in silent else value

        with torch.no_grad():
            value = float(self._again(min(skipped, default=len(self._base.skeleton.block_names)), read))
        memory.trim()
        return value

    def _silenced(self, skipped: frozenset[int]) -> frozenset[str]:
        """The tensors by which a block writes to the residual stream."""
        names: set[str] = set()
        for n in skipped:
            prefix = self._base.skeleton.block_names[n]
            for linear in self._base.anatomy().blocks[n].linears:
                if linear.role in ("o", "down"):
                    names |= {f"{prefix}.{linear.name}.weight", f"{prefix}.{linear.name}.bias"}
        return frozenset(names)
