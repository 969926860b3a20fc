"""Passes before the main one: rotations that are learned for the whole model, and scores for global decisions.

Each is journalled, so a killed run takes up what is finished: a learned rotation is a file of the work folder, scores
are records of the journal, block by block. Squared gradients are `fisher`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import LilliputError
from lilliput.export import provenance
from lilliput.folds.kinds import HeadRotations, ResidualRotation
from lilliput.machine import memory, ranks
from lilliput.model.block import BlockWeights
from lilliput.model.edited import views
from lilliput.model.rotated import Heads, RotatedModel
from lilliput.model.weights import Model
from lilliput.parts import transform
from lilliput.parts.inputs.grid import InputGrid
from lilliput.plan.plan import Plan, divided
from lilliput.plan.sizes import sizes
from lilliput.progress import Progress
from lilliput.run import editing, fisher
from lilliput.run.journal import Work, save_atomically
from lilliput.runtime import inputs
from lilliput.stats.site import SiteStats
from lilliput.streaming.backward import Samples
from lilliput.streaming.collect import collect
from lilliput.streaming.forward import through
from lilliput.streaming.walk import Flow, walk
from lilliput.target import Target
from lilliput.verbs.allocate import Allocate
from lilliput.verbs.learn import Learn
from lilliput.verbs.scores import Budget, Scores, Share
from lilliput.verbs.spec import Task
from lilliput.verbs.view import BlockIO, BlockView

ROTATION = "rotation"
Score = Callable[[int, BlockView, BlockIO], Scores]


def rotation_name(task: Task) -> str:
    """The file of a learned rotation."""
    return f"rotation-{task.step:02d}.safetensors"


def learned(plan: Plan, task: Task, model: Model, ids: Tensor | None, work: Work, progress: Progress) -> Model:
    """The model with the rotation of a `learn` step, which is learned now unless an earlier run did.

    ids [N, T] are all samples: a rotation is learned by the leading rank alone, for its loss is one of all of them.
    """
    turning = editing.turned(model)
    path = work.folder / rotation_name(task)
    records = [r for r in work.find("rotation") if r["step"] == task.step]
    width = turning.skeleton.hidden_size
    tensors = {ROTATION: torch.empty(width, width, dtype=torch.float64)}
    if not records:
        if ranks.lead():
            samples = None if ids is None else Samples(ids, work.folder, progress)
            with torch.enable_grad(), _rounding(plan, turning.skeleton):
                folds = task.of(Learn).run(turning, samples, plan.resolved.quantized(), task.options)
            tensors = _chosen(folds, width)
            save_atomically(path, {name: x.contiguous() for name, x in tensors.items()})
        heads = {name: provenance.sha256(x) for name, x in tensors.items() if name != ROTATION}
        record: dict[str, Any] = {"kind": "rotation", "step": task.step, "sha256": provenance.sha256(tensors[ROTATION])}
        work.note(record | ({"heads": heads} if heads else {}))
    (record,) = [r for r in work.find("rotation") if r["step"] == task.step]
    digests: dict[str, str] = {ROTATION: record["sha256"], **record.get("heads", {})}
    with ranks.together():
        if records and ranks.lead():
            tensors = load_file(path) if path.exists() else {}
            if {name: provenance.sha256(x) for name, x in tensors.items()} != digests:
                raise LilliputError(
                    f"{path} is not what the unfinished run wrote (a power failure?): delete {work.partial} and "
                    "start again"
                )
    rotated = turning.rotated(ranks.same(tensors[ROTATION].contiguous()))
    if len(digests) > 1:
        rotated = rotated.turned(_agreed_heads(turning, tensors, digests))
    memory.trim()
    return editing.replaced(model, turning, rotated) if any(x is turning for x in views(model)) else rotated


@contextmanager
def _rounding(plan: Plan, skeleton: Skeleton) -> Iterator[None]:
    """Let linears round their inputs as they will, where all that takes is known before any text is read."""
    modules: list[nn.Module] = []
    for x in plan.resolved.linears:
        activation, width = x.scheme.activation, x.linear.in_features
        if activation is None or activation.stored(width) or transform.names("in", x.scheme.inputs, width):
            continue
        nothing: Mapping[str, Tensor] = {}
        turns = transform.load("in", x.scheme.inputs, width, nothing.__getitem__)
        modules.append(skeleton.block(x.block).get_submodule(x.linear.name))
        inputs.attach(modules[-1], inputs.Rounding(InputGrid(activation), turns))
    try:
        yield
    finally:
        for module in modules:
            inputs.detach(module)


def _chosen(folds: Sequence[ResidualRotation | HeadRotations], width: int) -> dict[str, Tensor]:
    """What a learned step leaves: the product of its rotations, and those of heads by the names of `_head_name`."""
    out, heads = torch.eye(width, dtype=torch.float64), dict[str, Tensor]()
    for fold in folds:
        if isinstance(fold, ResidualRotation):
            out = out @ fold.matrix.to("cpu", torch.float64)
            continue
        for n, links in fold.blocks.items():
            for k, matrices in enumerate(links):
                own = matrices.to("cpu", torch.float64)
                before = heads.get(name := _head_name(n, k))
                heads[name] = own if before is None else before @ own
    return {ROTATION: out, **heads}


def _head_name(block: int, link: int) -> str:
    return f"heads.{block}.{link}"


def _agreed_heads(model: RotatedModel, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Heads:
    """The rotations of heads, the leader's on all ranks."""
    out: dict[int, list[Tensor]] = {}
    for n, block in enumerate(model.anatomy().blocks):
        links = [x for x in block.links if x.head]
        if not links or _head_name(n, 0) not in names:
            continue
        shapes = [(len(x.heads()[0]), x.head, x.head) for x in links]
        blank = [torch.empty(shape, dtype=torch.float64) for shape in shapes]
        out[n] = [ranks.same(tensors.get(_head_name(n, k), x).contiguous()) for k, x in enumerate(blank)]
    return out


def allocated(plan: Plan, task: Task, model: Model, ids: Tensor | None, work: Work, progress: Progress) -> Plan:
    """The plan with the targets that an `allocate` step decides on, from scores over all dense blocks.

    ids [N, T] are all samples, of which each rank takes its share.
    """

    def score(block: int, view: BlockView, io: BlockIO) -> Scores:
        return task.of(Allocate).score(view, io, task.options)

    return _decided(plan, task, model, scores(plan, task, model, ids, work, progress, score))


def decided(plan: Plan, task: Task, model: Model, work: Work) -> Plan:
    """What `allocated` has made of the plan, once more from the journal of a run whose blocks are finished."""
    return _decided(plan, task, model, recorded(task, work))


def budget(plan: Plan, task: Task) -> Budget:
    """The linears whose targets a step may decide."""
    governed = plan.resolved.governed(task)
    return {
        x.name: Share(
            x.block,
            (x.linear.out_features, x.linear.in_features),
            governed[x.name].target,
            sizes(plan, x, governed[x.name]),
        )
        for x in plan.resolved.linears
        if x.name in governed
    }


def _decided(plan: Plan, task: Task, model: Model, scores: Scores) -> Plan:
    targets = task.of(Allocate).run(scores, budget(plan, task), task.options)
    return divided(plan, model, plan.resolved.with_targets(task, targets))


def with_targets(plan: Plan, task: Task, model: Model, targets: Mapping[str, Target], note: str) -> Plan:
    """The plan with targets that a step has found, and what it says of them."""
    plan = divided(plan, model, plan.resolved.with_targets(task, targets))
    return replace(plan, notes=(*plan.notes, note))


def recorded(task: Task, work: Work) -> Scores:
    """The scores of all finished places, by full name."""
    records = [r for r in work.find("score") if r["step"] == task.step]
    return {name: tuple(values) for record in records for name, values in record["scores"].items()}


def scores(
    plan: Plan,
    task: Task,
    model: Model,
    ids: Tensor | None,
    work: Work,
    progress: Progress,
    score: Score,
) -> Scores:
    """Scores of all linears that the step governs, by full name, from the first block without a record on.

    ids [N, T] are all samples, of which each rank takes its share. `score` sees each block, on the leader.
    """
    ids = None if ids is None else ids[ranks.share(len(ids))]
    records = sorted((r for r in work.find("score") if r["step"] == task.step), key=lambda r: int(r["block"]))
    count = len(model.skeleton.block_names)
    for path in work.folder.glob(f"{_stem(task)}-*.bin"):
        # A run killed between a record and its tidying leaves the states of a finished block.
        if path.name != f"{_stem(task)}-{len(records):04d}.bin" or len(records) == count:
            path.unlink()
    if len(records) < count:
        with torch.no_grad():
            _score_blocks(plan, task, model, ids, work, progress, records, score)
    return recorded(task, work)


def _score_blocks(
    plan: Plan,
    task: Task,
    model: Model,
    ids: Tensor | None,
    work: Work,
    progress: Progress,
    records: list[dict[str, Any]],
    score: Score,
) -> None:
    count, start = len(model.skeleton.block_names), len(records)
    flow: Flow | None = None
    if task.needs:
        if ids is None:
            raise RuntimeError("scores were planned from calibration, but there are no tokens")
        flow = Flow(ids, plan.batching.batch, work.folder, _stem(task), plan.dtype)
    governed = plan.resolved.governed(task)
    progress.step(start, count, "scoring")
    for passage in walk(model, flow, first=start, recorded=records[-1]["hidden"] if records else None):
        index = passage.block
        anatomy = model.anatomy().blocks[index]
        prefix = model.skeleton.block_names[index]
        names = [x.name for x in anatomy.linears if f"{prefix}.{x.name}" in governed]
        stats: Mapping[str, SiteStats] = {}
        if passage.batches is not None and passage.inputs is not None:
            sites = [site for site in anatomy.sites if set(site.linears) & set(names)]
            needs = {site.name: task.needs for site in sites}
            passes = through(model.skeleton, index, passage.batches, passage.inputs, passage.outputs)
            stats = collect(model.skeleton, index, sites, needs, passes)
        model.unload_block(index)  # not beside what a score is taken from
        collected: Scores = {}
        if ranks.lead():
            weights = BlockWeights(model, index, anatomy)
            view = BlockView(anatomy, {name: weights.linear(anatomy.linear(name)).to(weights.device) for name in names})
            io = BlockIO(stats, fisher.reader(fisher.path_of(work, index)) if task.fisher else None)
            collected = score(index, view, io)
            del view
        work.note(
            {
                "kind": "score",
                "step": task.step,
                "block": index,
                "scores": {f"{prefix}.{name}": list(values) for name, values in collected.items()},
                "hidden": passage.checksum(),
            }
        )
        progress.step(index + 1, count, "scoring")


def _stem(task: Task) -> str:
    """Of the files of hidden states, which the main pass does not use."""
    return f"score-{task.step:02d}"
