"""The one block loop. One block is resident at a time; a killed run goes on at its first unwritten block."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilliput import export, fisher, lockstep, memory, order, passes, ranks
from lilliput.activations import START_ANEW, Activations, raw
from lilliput.anatomy.model import Block, Site
from lilliput.errors import LilliputError
from lilliput.formats import scales
from lilliput.forward import Batches, embed, through
from lilliput.inventory import METADATA
from lilliput.journal import Work, save_atomically
from lilliput.methods.fold import ScaleFold
from lilliput.methods.view import BlockIO, BlockView
from lilliput.model import Model
from lilliput.parts.layer import Layer, split, stack
from lilliput.plan import Plan
from lilliput.progress import Progress
from lilliput.resolve import LinearPlan, Task
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.weights import BlockWeights

Rows = list[dict[str, Any]]
_CHUNK = 1 << 21  # weights whose error is measured at a time


def _sha256(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(raw(flat)).hexdigest()


def _save(work: Work, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write one output file so that it is there whole or not at all; returns the tensors' hashes."""
    save_atomically(work.staging / name, tensors, METADATA)
    return {key: _sha256(value) for key, value in tensors.items()}


@dataclass(frozen=True)
class BlockJob:
    """What compressing one block needs to know; the fields do not change while it runs."""

    plan: Plan
    model: Model
    index: int
    anatomy: Block
    weights: BlockWeights
    exporter: export.Exporter
    fisher: Path | None = None  # squared gradients, where a step reads them

    @property
    def plans(self) -> dict[str, LinearPlan]:
        return {x.linear.name: x for x in self.plan.resolved.of_block(self.index)}

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset().union(*(task.needs for name in site.linears for task in self.plans[name].tasks))

    def tap(self, site: Site) -> lockstep.Tap:
        block = self.model.skeleton.block(self.index)
        return lockstep.Tap(site.name, block.get_submodule(site.linears[0]))


def _error(weight: Tensor, decoded: Tensor, stats: SiteStats | None, rough: bool) -> tuple[float, str]:
    """Relative error of a finished layer: of its outputs where the Gram matrix is known, else of its weights.

    `rough`: the outputs' whole energy, a sum without cancellation, may round its factors to bfloat16.
    """
    gram = stats.gram if stats is not None and stats.count else None
    lost = whole = 0.0
    step = max(1, _CHUNK // weight.shape[1])
    for a in range(0, len(weight), step):
        some = weight[a : a + step]
        change = decoded[a : a + step] - some
        if gram is None:
            lost += float(change.square().sum())
            whole += float(some.square().sum())
            continue
        lost += float((change @ gram).mul_(change).sum())
        with fold.reduced_products(rough):
            whole += float((some @ gram).mul_(some).sum())
    ratio = (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0
    return ratio, "weight" if gram is None else "output"


def compress_site(job: BlockJob, site: Site, stats: SiteStats | None) -> tuple[dict[str, Tensor], Rows]:
    """Apply the compress steps to the linears of a site; the block's modules take over the result.

    Returns the tensors to store (by stored name) and one report row a linear. Of several ranks the leader alone solves:
    the others get the weights from it, so that all go on with the same bits, and return nothing.
    """
    tensors, rows = _solved(job, site, stats) if ranks.lead() else ({}, [])
    skeleton = job.model.skeleton
    if stats is not None and ranks.size() > 1:
        for name in (f"{job.plans[x].name}.weight" for x in site.linears if job.plans[x].tasks):
            like = torch.empty(skeleton.shapes[name], dtype=skeleton.dtype_of(name), device=skeleton.device)
            value = skeleton.tensor(name).contiguous() if ranks.lead() else like
            skeleton.load({name: ranks.same(value)})
    return tensors, rows


def _solved(job: BlockJob, site: Site, stats: SiteStats | None) -> tuple[dict[str, Tensor], Rows]:
    skeleton = job.model.skeleton
    device = torch.device(skeleton.device)
    empty = SiteStats(site.width, 0)
    stats = empty if stats is None else stats.to(device)
    tensors: dict[str, Tensor] = {}
    rows: Rows = []
    for names in _stacks(job, site):
        start = time.perf_counter()
        plans = [job.plans[name] for name in names]
        layers = [fisher.layer(job.fisher, p, job.weights) for p in plans]
        layer = stack(layers)
        del layers
        for task in plans[0].tasks:
            layer = _apply(task, layer, stats)
        seconds = time.perf_counter() - start
        pieces = split(layer, [(p.name, p.linear.out_features) for p in plans])
        for plan, piece in zip(plans, pieces, strict=True):
            decoded = piece.decode()
            if piece.parts and not plan.scheme.parts:  # a plain tensor holds what its type can
                decoded = decoded.to(job.plan.outcomes[plan.name].dtype).float()
            error, of = _error(piece.weight, decoded, stats, job.plan.dtype is torch.bfloat16)
            stored = _stored(job, plan, piece)
            value = job.weights.to_stored(plan.linear, decoded)
            skeleton.load({f"{plan.name}.weight": value})
            tensors.update(stored)
            rows.append(
                {
                    "name": plan.name,
                    "methods": [task.method.name for task in plan.tasks],
                    "bits": 8 * sum(t.numel() * t.element_size() for t in stored.values()) / plan.linear.parameters,
                    "error": error,
                    "error_of": of,
                    "zeros": float((decoded == 0).float().mean()),
                    "tokens": stats.count,
                    "seconds": seconds * plan.linear.parameters / sum(p.linear.parameters for p in plans),
                }
            )
    return tensors, rows


def _apply(task: Task, layer: Layer, stats: SiteStats) -> Layer:
    out: Layer = task.method.module.compress(layer, stats.through(layer.inputs), task.target, task.options)
    return out


def _stacks(job: BlockJob, site: Site) -> list[list[str]]:
    """Linears of a site that may be treated as one: equal tasks, methods that treat each row by itself."""
    groups: list[list[str]] = []
    for name in site.linears:
        tasks = job.plans[name].tasks
        if not tasks:
            continue
        alone = any(
            not task.method.rowwise or task.target.group_size == 0 or scales.joins_rows(task.target.scale_dtype)
            for task in tasks
        )
        if groups and not alone and job.plans[groups[-1][0]].tasks == tasks:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _stored(job: BlockJob, plan: LinearPlan, layer: Layer) -> dict[str, Tensor]:
    packed = job.exporter.pack(job.plan.outcomes[plan.name], layer)
    return {name: value.cpu().contiguous() for name, value in packed.items()}


def _collect(
    job: BlockJob, batches: Batches, inputs: Activations, sites: Sequence[Site], needs: Mapping[str, Iterable[str]]
) -> dict[str, SiteStats]:
    """Statistics of several sites from one run of the block up to the last of them."""
    skeleton = job.model.skeleton
    states = {site.name: fold.init(site.width, needs[site.name], skeleton.device) for site in sites}

    def see(site: str, x: Tensor) -> None:
        states[site] = fold.update(states[site], x)

    taps = [job.tap(site) for site in sites]
    # Experts may be skipped by a batch, so only a block without them can be left early.
    early = all(x.expert is None for x in job.anatomy.linears)
    lockstep.watch(taps, through(job.model, job.index, batches, inputs, None), see, stop_after=early)
    return {name: fold.all_reduce(fold.finish(state)) for name, state in states.items()}


def rewrite_block(job: BlockJob, batches: Batches | None, inputs: Activations | None) -> None:
    """Apply the rewrite steps: the function stays the same, the weights become easier to compress."""
    for task in job.plan.resolved.rewrites.get(job.index, ()):
        covered = {x.name for x in job.anatomy.linears}
        sites = [job.anatomy.site(name) for name in dict.fromkeys(link.site for link in job.anatomy.links)]
        sites = [site for site in job.anatomy.sites if site in sites]
        if not sites:
            continue
        stats: dict[str, SiteStats] = {}
        if task.needs and batches is not None and inputs is not None:
            needs = {site.name: task.needs for site in sites}
            stats = _collect(job, batches, inputs, sites, needs)
        names = sorted({name for link in job.anatomy.links for name in link.readers if name in covered})
        names = names if ranks.lead() else []
        view = BlockView(job.anatomy, {n: job.weights.linear(job.anatomy.linear(n)) for n in names})
        job.weights.fold(_folds(task, view, BlockIO(stats)))
        touched = {name: job.weights.tensor(name) for name in job.weights.names() if job.weights.folded(name)}
        if batches is not None:
            job.model.skeleton.load({job.weights.canonical(name): value for name, value in touched.items()})


def _folds(task: Task, view: BlockView, io: BlockIO) -> Sequence[ScaleFold]:
    """What a rewrite step decides on; the leader decides for all ranks."""
    if ranks.size() == 1:
        folds: Sequence[ScaleFold] = task.method.module.rewrite(view, io, task.target, task.options)
        return folds
    links = view.anatomy.links
    found: list[tuple[int, list[float]]] = []
    if ranks.lead():
        number = {id(link): n for n, link in enumerate(links)}
        folds = task.method.module.rewrite(view, io, task.target, task.options)
        found = [(number[id(fold.link)], fold.scale.tolist()) for fold in folds]
    return [ScaleFold(links[n], torch.tensor(scale)) for n, scale in ranks.agreed(found)]


def compress_block(
    job: BlockJob, batches: Batches | None, inputs: Activations | None, outputs: Activations | None
) -> tuple[dict[str, Tensor], Rows]:
    """Compress one block (loaded where there is calibration) and run it, so that later blocks see its error."""
    skeleton = job.model.skeleton
    tensors: dict[str, Tensor] = {}
    rows: Rows = []

    def take(site: Site, stats: SiteStats | None) -> None:
        packed, seen = compress_site(job, site, stats)
        tensors.update(packed)
        rows.extend(seen)

    rewrite_block(job, batches, inputs)
    if batches is None or inputs is None or outputs is None:
        for site in job.anatomy.sites:
            take(site, None)
        return tensors, rows

    runs = through(job.model, job.index, batches, inputs, outputs)
    wanted = [site for site in job.anatomy.sites if any(job.plans[name].tasks for name in site.linears)]
    if job.plan.layout.lockstep:
        current: dict[str, SiteStats] = {}

        def see(site: str, x: Tensor) -> None:
            if site not in current:
                current[site] = fold.init(x.shape[-1], job.needs(job.anatomy.site(site)), skeleton.device)
            current[site] = fold.update(current[site], x)

        def arrived(name: str) -> None:
            site = job.anatomy.site(name)
            state = current.pop(name, None) or fold.init(site.width, job.needs(site), skeleton.device)
            take(site, fold.all_reduce(fold.finish(state)))

        first_pass = through(job.model, job.index, batches, inputs, None)[:1]
        met = order.as_met(job.anatomy, wanted, [job.tap(site) for site in wanted], first_pass)
        lockstep.walk([job.tap(site) for site in met], runs, see, arrived)
    else:
        for wave in order.waves(wanted):
            stats = _collect(job, batches, inputs, wave, {site.name: job.needs(site) for site in wave})
            for site in wave:
                take(site, stats.pop(site.name))
        for run in runs:
            run()
    number = {name: n for n, name in enumerate(name for site in job.anatomy.sites for name in site.linears)}
    return tensors, sorted(rows, key=lambda row: number[row["name"].removeprefix(f"{job.weights.prefix}.")])


def _block_tensors(job: BlockJob, done: Mapping[str, Tensor], shard: int) -> dict[str, Tensor]:
    """All tensors of a block's file: the compressed ones and the rest as they are, or as folds left them."""
    out = dict(done)
    cut = len(job.weights.prefix) + 1
    untouched = {x.name: x for x in job.plans.values() if not x.tasks}
    for planned in job.plan.of_shard(shard):
        if planned.name in out:
            continue
        if planned.source in untouched:
            linear = untouched[planned.source]
            layer = Layer(linear.name, job.weights.linear(linear.linear))
            out.update(job.exporter.pack(job.plan.outcomes[linear.name], layer))
        else:
            out[planned.name] = job.weights.tensor(planned.source[cut:]).to(planned.dtype).contiguous()
    return out


def run(plan: Plan, model: Model, ids: Tensor | None, work: Work, progress: Progress) -> Rows:
    """Carry out a plan, from its first unwritten block on. Returns the report rows of all blocks, in order.

    ids [N, T] are all samples. Each rank takes its share of them through the blocks; the leader writes.
    """
    skeleton = model.skeleton
    count = len(skeleton.block_names)
    first = len(plan.shards) - count
    finished = {int(r["block"]): r for r in work.find("block")}
    whole = {int(r["shard"]) for r in work.find("outside")}
    with ranks.together():
        for name in (plan.shards[n] for n in (*whole, *(first + n for n in finished))):
            if ranks.lead() and not (work.staging / name).is_file():
                raise LilliputError(
                    f"{work.staging / name} was written by the unfinished run and is gone; {START_ANEW}"
                )
    model = passes.learned(plan, model, ids, work, progress)
    everything, ids = ids, None if ids is None else ids[ranks.share(len(ids))]
    with torch.no_grad():
        for shard in range(first):
            if shard not in whole:
                hashes: dict[str, str] = {}
                if ranks.lead():
                    tensors = {
                        x.name: (
                            model.source.read(x.source) if x.kind == "carried" else model.read(x.source).to(x.dtype)
                        ).contiguous()
                        for x in plan.of_shard(shard)
                    }
                    hashes = _save(work, plan.shards[shard], tensors)
                    del tensors
                    memory.trim()
                work.note({"kind": "outside", "shard": shard, "sha256": hashes})
        progress.step(len(finished), count)
        if len(finished) < count:
            plan = passes.allocated(plan, model, ids, work, progress)
            fisher.take(plan, model, everything, work, progress, len(finished))
            _blocks(plan, model, ids, work, progress, finished, first)
    rows: Rows = []
    for record in sorted(work.find("block"), key=lambda r: int(r["block"])):
        rows += record["rows"]
    return rows


def _hidden(work: Work, block: int, shape: tuple[int, int, int], dtype: torch.dtype, create: bool) -> Activations:
    return Activations(work.folder / f"hidden-{block:04d}.bin", shape, dtype, create=create)


def _blocks(
    plan: Plan,
    model: Model,
    ids: Tensor | None,
    work: Work,
    progress: Progress,
    finished: Mapping[int, Any],
    first: int,
) -> None:
    anatomy = model.anatomy()
    skeleton = model.skeleton
    start = len(finished)
    batches: Batches | None = None
    inputs: Activations | None = None
    shape = (0, 0, 0)
    if plan.resolved.needs:
        if ids is None:
            raise RuntimeError("calibration was planned but there are no tokens")
        shape = (len(ids), ids.shape[1], int(model.source.text_config.hidden_size))
        with ranks.together():
            inputs = _hidden(work, start, shape, plan.dtype, create=start == 0)
            rotations = (f"rotation-{task.step:02d}.safetensors" for task in plan.resolved.learned)
            work.keep([inputs.path.name, *rotations, *fisher.kept(work)])
            if start and inputs.checksum() != finished[start - 1]["hidden"][ranks.rank()]:
                raise LilliputError(
                    f"{inputs.path} is not what the unfinished run wrote (a power failure?); {START_ANEW}"
                )
        batches = embed(model, ids, plan.layout.batch, inputs if start == 0 else None)
    exporter = export.get(plan.exporter)
    for index in range(start, len(skeleton.block_names)):
        weights = BlockWeights(model, index, anatomy.blocks[index])
        squares = fisher.path_of(work, index) if plan.resolved.fisher(plan.samples) else None
        job = BlockJob(plan, model, index, anatomy.blocks[index], weights, exporter, squares)
        outputs = None
        if batches is not None:
            model.load_block(index)
            outputs = _hidden(work, index + 1, shape, plan.dtype, create=True)
        done, rows = compress_block(job, batches, inputs, outputs)
        model.unload_block(index)
        hashes: dict[str, str] = {}
        if ranks.lead():
            tensors = _block_tensors(job, done, first + index)
            del done
            hashes = _save(work, plan.shards[first + index], tensors)
            del tensors
        # Only now is the block finished: its file is whole, and so are the inputs of the next one on all ranks.
        check = None if outputs is None else ranks.gathered(outputs.checksum())
        work.note({"kind": "block", "block": index, "rows": rows, "sha256": hashes, "hidden": check})
        if inputs is not None:
            inputs.delete()
        if squares is not None:
            squares.unlink(missing_ok=True)
        inputs = outputs
        memory.trim()
        worst = max((float(row["error"]) for row in rows), default=0.0)
        progress.step(index + 1, len(skeleton.block_names), f"error {worst:.4f}")
    if inputs is not None:
        inputs.delete()
