"""The one block loop. One block is resident at a time; a killed run goes on at its first unwritten block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lilliput import export
from lilliput.anatomy.model import Site
from lilliput.machine import memory, ranks
from lilliput.machine.cost import Cost
from lilliput.model.block import BlockWeights
from lilliput.model.weights import Model
from lilliput.parts.layer import Layer, split, stack
from lilliput.plan import tensors as inventory
from lilliput.plan.plan import Plan, resized
from lilliput.plan.resolve import stacked
from lilliput.plan.tensors import TensorPlan
from lilliput.progress import Progress
from lilliput.run import behaving, caching, drivers, fisher, fitting, repairing, rewriting, slopes, stages, tables
from lilliput.run.driver import BlockDriver, RepairDriver
from lilliput.run.journal import Work
from lilliput.run.linear import BlockJob, Rows, deliver, fits, install, lowered, overflow, same_inputs, within
from lilliput.run.output import Output
from lilliput.run.repairing import Teacher
from lilliput.source import layers
from lilliput.stats.site import SiteStats
from lilliput.streaming import lockstep, order
from lilliput.streaming.collect import Collector, collect, tap
from lilliput.streaming.forward import Batches, through
from lilliput.streaming.states import Activations
from lilliput.streaming.walk import Flow, Passage, taken_up, walk
from lilliput.verbs.spec import Stage, Task


def compress_site(
    job: BlockJob, site: Site, stats: SiteStats | None, layers: dict[str, Layer]
) -> tuple[dict[str, Tensor], Rows]:
    """Apply the compress steps to the linears of a site; the block's modules take over the result.

    Returns the tensors to store (by stored name) and one report row a linear; layers that a later step fits together
    with their block go to `kept` instead. Of several ranks the leader alone solves:
    the others get the weights from it, so that all go on with the same bits, and return nothing.
    """
    tensors, rows = _solved(job, site, stats, layers) if ranks.lead() else ({}, [])
    skeleton = job.model.skeleton
    if stats is not None and ranks.size() > 1:
        for name in (f"{job.plans[x].name}.weight" for x in site.linears if job.plans[x].tasks):
            like = torch.empty(skeleton.shapes[name], dtype=skeleton.dtype_of(name), device=skeleton.device)
            value = skeleton.tensor(name).contiguous() if ranks.lead() else like
            skeleton.load({name: ranks.same(value)})
        for plan in (job.plans[x] for x in site.linears):
            same_inputs(job, plan)
    return tensors, rows


def _solved(
    job: BlockJob, site: Site, stats: SiteStats | None, held_back: dict[str, Layer]
) -> tuple[dict[str, Tensor], Rows]:
    device = torch.device(job.model.skeleton.device)
    empty = SiteStats(site.width, 0)
    stats = empty if stats is None else stats.to(device)
    tensors: dict[str, Tensor] = {}
    rows: Rows = []
    own = job.plans
    for plans in stacked([own[name] for name in site.linears]):
        start = time.perf_counter()
        layers = [fisher.layer(job.fisher, p, job.weights) for p in plans]
        layer = stack(layers)
        del layers
        dtype = job.plan.outcomes[plans[0].name].dtype
        layer = lowered(layer, dtype) if plans[0].together else layer
        layer = within(layer, dtype, partial(drivers.applied, plans[0].alone, stats))
        seconds = time.perf_counter() - start
        pieces = split(layer, [(p.name, p.linear.out_features) for p in plans])
        for plan, piece in zip(plans, pieces, strict=True):
            share = seconds * plan.linear.parameters / sum(p.linear.parameters for p in plans)
            if plan.together:
                held_back[plan.linear.name] = piece
                install(job, plan, piece.decode(), piece)
                continue
            stored, row = deliver(job, plan, piece, stats, share)
            tensors.update(stored)
            rows.append(row)
        del layer, pieces, piece  # not beside the next linear's
        memory.trim()  # the heap is full of holes by now, and more so the more blocks there are
    return tensors, rows


def _collect(
    job: BlockJob, batches: Batches, inputs: Activations, sites: Sequence[Site], needs: Mapping[str, frozenset[str]]
) -> dict[str, SiteStats]:
    """Statistics of several sites from one run of the block up to the last of them."""
    skeleton = job.model.skeleton
    # Experts may be skipped by a batch, so only a block without them can be left early.
    early = all(x.expert is None for x in job.anatomy.linears)
    passes = through(skeleton, job.index, batches, inputs, None)
    return collect(skeleton, job.index, sites, needs, passes, stop_after=early)


def rewrite_block(job: BlockJob, batches: Batches | None, inputs: Activations | None) -> None:
    """Apply the rewrite steps: the function stays the same, the weights become easier to compress."""
    for task in job.plan.resolved.at(Stage.BLOCK):
        if isinstance(drivers.find(task), RepairDriver):
            _repair(job, task, batches, inputs)
            continue
        view = rewriting.seen(job.model, job.index, job.weights, task, batches, inputs)
        if view is None:
            continue
        job.weights.fold(drivers.of(task, BlockDriver).run(task, *view))
        if batches is not None:
            rewriting.load_folded(job.model.skeleton, job.weights)


def _repair(job: BlockJob, task: Task, batches: Batches | None, inputs: Activations | None) -> None:
    if batches is None or inputs is None or job.teacher is None:
        raise RuntimeError(f"{task.label} was planned without calibration")
    run = drivers.of(task, RepairDriver).run
    for name, weight in run(task, job.model, job.weights, job.index, batches, inputs, job.teacher).items():
        job.weights.put(job.anatomy.linear(name), weight)
    rewriting.load_folded(job.model.skeleton, job.weights)


def compress_block(
    job: BlockJob, batches: Batches | None, inputs: Activations | None, outputs: Activations | None
) -> tuple[dict[str, Tensor], Rows]:
    """Compress one block (loaded where there is calibration) and run it, so that later blocks see its error."""
    tensors: dict[str, Tensor] = {}
    rows: Rows = []
    layers: dict[str, Layer] = {}

    def take(site: Site, stats: SiteStats | None) -> None:
        packed, observed = compress_site(job, site, stats, layers)
        tensors.update(packed)
        rows.extend(observed)

    rewrite_block(job, batches, inputs)
    if batches is None or inputs is None or outputs is None:
        for site in job.anatomy.sites:
            take(site, None)
        return tensors, rows

    sites = [site for site in job.anatomy.sites if any(job.plans[name].alone for name in site.linears)]
    fits = [task for x in job.plans.values() for task in x.together]
    if fits:
        # Targets are those of the block before anything in it is compressed.
        needs = frozenset().union(*(task.needs for task in fits))
        with fitting.observe(job.model, job.index, job.anatomy, batches, inputs, needs) as observed:
            if sites:
                _compress_sites(job, batches, inputs, None, sites, take)
            fitted, more = fitting.fit_block(job, batches, inputs, observed, layers)
        tensors.update(fitted)
        rows += more
        for run in through(job.model.skeleton, job.index, batches, inputs, outputs):
            run()
    else:
        _compress_sites(job, batches, inputs, outputs, sites, take)
    if behaving.fitting(job):
        tensors.update(behaving.behave(job, batches, inputs, outputs))
    if caching.fitting(job):
        tensors.update(caching.fit(job, batches, inputs))
    number = {name: n for n, name in enumerate(name for site in job.anatomy.sites for name in site.linears)}
    return tensors, sorted(rows, key=lambda row: number[row["name"].removeprefix(f"{job.weights.prefix}.")])


def _compress_sites(
    job: BlockJob,
    batches: Batches,
    inputs: Activations,
    outputs: Activations | None,
    sites: Sequence[Site],
    take: Callable[[Site, SiteStats | None], None],
) -> None:
    """Show every site to `take` with the statistics of its inputs, the sites before it being compressed."""
    skeleton = job.model.skeleton
    needs = {site.name: job.needs(site) for site in sites}
    runs = through(skeleton, job.index, batches, inputs, outputs)
    if job.plan.batching.lockstep:
        collector = Collector(skeleton, job.index, sites, needs)
        first_pass = through(skeleton, job.index, batches, inputs, None)[:1]
        ordered = order.as_met(job.anatomy, sites, collector.taps, first_pass)
        taps = [tap(skeleton, job.index, site) for site in ordered]
        lockstep.walk(taps, runs, collector.see, lambda site: take(job.anatomy.site(site), collector.take(site)))
    else:
        for wave in order.waves(sites):
            stats = _collect(job, batches, inputs, wave, needs)
            for site in wave:
                take(site, stats.pop(site.name))
        for run in runs if outputs is not None else ():
            run()


def _block_tensors(job: BlockJob, finished: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a block: the compressed ones and the rest as they are, or as folds left them."""
    out = dict(finished)
    length = len(job.weights.prefix) + 1
    untouched = {x.name: x for x in job.plans.values() if not x.tasks}
    for planned in job.plan.of_block(job.index):
        if planned.name in out:
            continue
        if planned.source in untouched:
            linear, outcome = untouched[planned.source], job.plan.outcomes[planned.source]
            if linear.scheme.parts:  # codes that a recipe which only trains takes up
                source, rows, width = job.model.source, outcome.out_features, outcome.in_features
                layer = layers.layer(source, outcome.stored, linear.name, rows, width)
            else:
                layer = Layer(linear.name, job.weights.linear(linear.linear))
            out.update(job.exporter.pack(outcome, layer))
        else:
            value = job.weights.tensor(planned.source[length:])
            if job.weights.folded(planned.source[length:]) and not fits(value, planned.dtype):
                raise overflow(planned.source, planned.dtype)
            out[planned.name] = value.to(planned.dtype).contiguous()
    return out


def _write(job: BlockJob, finished: Mapping[str, Tensor], output: Output) -> dict[str, str]:
    tensors = _block_tensors(job, finished)
    return output.write(tensors, lambda name: [tensors[name]])


def cost(plan: Plan, model: Model) -> Cost:
    """What lies in the work folder at its fullest, over all passes of a run: between blocks there are the hidden states
    that enter one and those that leave it."""
    # What flows between blocks may be wider than the embeddings.
    states = plan.samples * plan.tokens * model.skeleton.hidden_size * plan.dtype.itemsize
    between = Cost(disk=2 * states if plan.resolved.needs else 0)
    phases = between.then(stages.cost(plan, model)).then(fisher.cost(plan, model))
    return phases + fisher.stored(plan) + slopes.cost(plan, model)


def run(plan: Plan, model: Model, ids: Tensor | None, work: Work, progress: Progress) -> Rows:
    """Carry out a plan, from its first unwritten block on. Returns the report rows of all blocks, in order.

    ids [N, T] are all samples. Each rank takes its share of them through the blocks; the leader writes.
    """
    count = len(model.skeleton.block_names)
    finished = {int(r["block"]): r for r in work.find("block")}
    model = stages.prepared(plan, model, ids, work, progress)
    plan = resized(plan, model)
    everything, ids = ids, None if ids is None else ids[ranks.share(len(ids))]
    with torch.no_grad():
        progress.step(len(finished), count)
        if len(finished) < count:
            slopes.take(plan, model, everything, work, progress, len(finished))
            fisher.take(plan, model, everything, work, progress, len(finished))
            plan = stages.allocated(plan, model, everything, work, progress)
        else:
            plan = stages.decided(plan, model, work)
        output = Output(work.staging, plan.files)
        _begin(plan, model, work, output)
        if len(finished) < count:
            _blocks(plan, model, ids, work, progress, finished, output)
        if tables.pending(plan, work):
            _tables(plan, model, ids, work, progress, output)
        with ranks.together():
            if ranks.lead():
                output.finish()
    return finished_rows(work)


def finished_rows(work: Work) -> Rows:
    """The report rows of all blocks, in order, from the journal of a run whose blocks are finished."""
    rows: Rows = []
    for record in sorted(work.find("block"), key=lambda r: int(r["block"])):
        rows += record["rows"]
    return rows + tables.rows(work)


def _tables(plan: Plan, model: Model, ids: Tensor | None, work: Work, progress: Progress, output: Output) -> None:
    """Compress the embedding and the head, from the hidden states that the last block has left."""
    hidden: Activations | None = None
    if plan.resolved.needs and ids is not None:
        count = len(model.skeleton.block_names)
        last = max(work.find("block"), key=lambda record: int(record["block"]))
        hidden = taken_up(model, _flow(plan, ids, work), count, last["hidden"])
    tables.compress(plan, model, ids, hidden, work, output, progress)
    if hidden is not None:
        hidden.delete()


def _begin(plan: Plan, model: Model, work: Work, output: Output) -> None:
    """Lay out the files and write what lies outside the blocks, or take up the files of a run that has done so."""
    hashes: dict[str, str] = {}
    resumed = bool(work.find("outside"))
    with ranks.together():
        if ranks.lead() and resumed:
            output.take_up(work.hashes())
        elif ranks.lead():
            output.lay_out()
            outside = {x.name: x for x in plan.of_block(None) if x.kind != "quantized"}
            hashes = output.write(outside, lambda name: _pieces(outside[name], model))
            memory.trim()
    if not resumed:
        work.note({"kind": "outside", "sha256": hashes})


def _pieces(planned: TensorPlan, model: Model) -> Iterator[Tensor]:
    """A tensor outside the blocks, a large one a few rows at a time: a vocabulary's table may be the largest thing of
    all, and dequantized it is four times what is written."""
    carried = planned.kind == "carried"
    rows = inventory.rows_at_a_time(planned.shape)
    if not planned.shape or rows >= planned.shape[0]:
        yield (model.source.read(planned.source) if carried else model.read(planned.source)).to(planned.dtype)
        return
    for start in range(0, planned.shape[0], rows):
        stop = min(start + rows, planned.shape[0])
        part = (
            model.source.read(planned.source, (start, stop))
            if carried
            else model.read_rows(planned.source, start, stop)
        )
        yield part.to(planned.dtype)


def _flow(plan: Plan, ids: Tensor, work: Work) -> Flow:
    return Flow(ids, plan.batching.batch, work.folder, "hidden", plan.dtype)


def _blocks(
    plan: Plan,
    model: Model,
    ids: Tensor | None,
    work: Work,
    progress: Progress,
    finished: Mapping[int, Any],
    output: Output,
) -> None:
    start = len(finished)
    flow: Flow | None = None
    if plan.resolved.flows:
        if ids is None:
            raise RuntimeError("calibration was planned but there are no tokens")
        flow = _flow(plan, ids, work)
        work.keep([flow.path(start).name, *stages.files(plan), *fisher.file_names(work), *slopes.file_names(work)])
    recorded = finished[start - 1]["hidden"] if start else None
    tables = bool(plan.resolved.tables)  # which are made from what the last block has left
    repairs = any(isinstance(drivers.find(task), RepairDriver) for task in plan.resolved.tasks)
    passages = walk(model, flow, first=start, recorded=recorded, keep=tables)
    with repairing.teacher(model, flow) if repairs and flow is not None else nullcontext() as teacher:
        _walk(plan, model, passages, teacher, work, progress, output)


def _walk(
    plan: Plan,
    model: Model,
    passages: Iterator[Passage],
    teacher: Teacher | None,
    work: Work,
    progress: Progress,
    output: Output,
) -> None:
    anatomy, exporter = model.anatomy(), export.get(plan.exporter)
    for passage in passages:
        index = passage.block
        weights = BlockWeights(model, index, anatomy.blocks[index])
        squares = fisher.path_of(work, index) if plan.resolved.fisher(plan.samples) else None
        sloped = slopes.path_of(work, index)
        back = sloped if sloped.is_file() else None
        job = BlockJob(plan, model, index, anatomy.blocks[index], weights, exporter, squares, back, teacher)
        tensors, rows = compress_block(job, passage.batches, passage.inputs, passage.outputs)
        model.unload_block(index)  # not beside the tensors while they are written
        hashes: dict[str, str] = {}
        if ranks.lead():
            hashes = _write(job, tensors, output)
        del tensors
        # Only now is the block finished: its tensors are on the disk, and the next one's inputs with all ranks.
        record = {"kind": "block", "block": index, "rows": rows, "sha256": hashes, "hidden": passage.checksum()}
        work.note(record)
        if squares is not None:
            squares.unlink(missing_ok=True)
        sloped.unlink(missing_ok=True)
        worst = max((float(row["error"]) for row in rows), default=0.0)
        progress.step(index + 1, len(model.skeleton.block_names), f"error {worst:.4f}")
