"""The one block loop. One block is resident at a time; a killed run goes on at its first unwritten block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lilliput import export
from lilliput.anatomy.model import Site
from lilliput.errors import LilliputError
from lilliput.formats import scales
from lilliput.machine import memory, ranks
from lilliput.model.block import BlockWeights
from lilliput.model.stored import Model
from lilliput.parts.layer import Layer, split, stack
from lilliput.plan import tensors as inventory
from lilliput.plan.plan import Plan
from lilliput.plan.tensors import TensorPlan
from lilliput.progress import Progress
from lilliput.run import drivers, fisher, fitting, stages, tables
from lilliput.run.driver import BlockDriver, LinearDriver
from lilliput.run.journal import Work
from lilliput.run.linear import BlockJob, Rows, deliver, fits, install, lowered, overflow, within
from lilliput.run.output import Output
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.streaming import lockstep, order
from lilliput.streaming.forward import Batches, embed, through
from lilliput.streaming.states import START_ANEW, Activations
from lilliput.verbs.spec import Stage, Task
from lilliput.verbs.view import BlockIO, BlockView


def compress_site(
    job: BlockJob, site: Site, stats: SiteStats | None, kept: dict[str, Layer]
) -> tuple[dict[str, Tensor], Rows]:
    """Apply the compress steps to the linears of a site; the block's modules take over the result.

    Returns the tensors to store (by stored name) and one report row a linear; layers that a later step fits together
    with their block go to `kept` instead. Of several ranks the leader alone solves:
    the others get the weights from it, so that all go on with the same bits, and return nothing.
    """
    tensors, rows = _solved(job, site, stats, kept) if ranks.lead() else ({}, [])
    skeleton = job.model.skeleton
    if stats is not None and ranks.size() > 1:
        for name in (f"{job.plans[x].name}.weight" for x in site.linears if job.plans[x].tasks):
            like = torch.empty(skeleton.shapes[name], dtype=skeleton.dtype_of(name), device=skeleton.device)
            value = skeleton.tensor(name).contiguous() if ranks.lead() else like
            skeleton.load({name: ranks.same(value)})
    return tensors, rows


def _solved(
    job: BlockJob, site: Site, stats: SiteStats | None, kept: dict[str, Layer]
) -> tuple[dict[str, Tensor], Rows]:
    device = torch.device(job.model.skeleton.device)
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
        dtype = job.plan.outcomes[plans[0].name].dtype
        layer = lowered(layer, dtype) if plans[0].together else layer
        layer = within(layer, dtype, partial(_applied, plans[0].alone, stats))
        seconds = time.perf_counter() - start
        pieces = split(layer, [(p.name, p.linear.out_features) for p in plans])
        for plan, piece in zip(plans, pieces, strict=True):
            share = seconds * plan.linear.parameters / sum(p.linear.parameters for p in plans)
            if plan.together:
                kept[plan.linear.name] = piece
                install(job, plan, piece.decode())
                continue
            stored, row = deliver(job, plan, piece, stats, share)
            tensors.update(stored)
            rows.append(row)
        del layer, pieces, piece  # not beside the next linear's
        memory.trim()  # the heap is full of holes by now, and more so the more blocks there are
    return tensors, rows


def _applied(tasks: Sequence[Task], stats: SiteStats, layer: Layer) -> Layer:
    for task in tasks:
        layer = drivers.of(task, LinearDriver).run(task, layer, stats.through(layer.inputs))
    return layer


def _stacks(job: BlockJob, site: Site) -> list[list[str]]:
    """Linears of a site that may be treated as one: equal tasks, methods that treat each row by itself."""
    groups: list[list[str]] = []
    for name in site.linears:
        tasks = job.plans[name].alone
        if not tasks:
            continue
        alone = any(
            not drivers.of(task, LinearDriver).stacks(task)
            or task.target.group_size == 0
            or scales.joins_rows(task.target.scale_dtype)
            for task in tasks
        )
        if groups and not alone and job.plans[groups[-1][0]].tasks == job.plans[name].tasks:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


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
    return {name: fold.complete(state, _site(job, name), skeleton.dtype) for name, state in states.items()}


def _site(job: BlockJob, name: str) -> str:
    return f"{job.model.skeleton.block_names[job.index]}.{name}"


def rewrite_block(job: BlockJob, batches: Batches | None, inputs: Activations | None) -> None:
    """Apply the rewrite steps: the function stays the same, the weights become easier to compress."""
    for task in job.plan.resolved.at(Stage.BLOCK):
        covered = {x.name for x in job.anatomy.linears}
        sites = [job.anatomy.site(name) for name in dict.fromkeys(link.site for link in job.anatomy.links)]
        sites = [site for site in job.anatomy.sites if site in sites]
        if not sites:
            continue
        stats: dict[str, SiteStats] = {}
        moved = None
        if task.needs and batches is not None and inputs is not None:
            needs = {site.name: task.needs for site in sites}
            stats = _collect(job, batches, inputs, sites, needs)
            moved = fitting.movement(job.model, job.index, job.anatomy, batches, inputs)
        names = sorted({name for link in job.anatomy.links for name in link.readers if name in covered})
        names = names if ranks.lead() else []
        view = BlockView(
            job.anatomy, {n: job.weights.linear(job.anatomy.linear(n)).to(job.weights.device) for n in names}
        )
        job.weights.fold(drivers.of(task, BlockDriver).run(task, view, BlockIO(stats, moved=moved)))
        touched = {name: job.weights.tensor(name) for name in job.weights.names() if job.weights.folded(name)}
        if batches is not None:
            job.model.skeleton.load({job.weights.canonical(name): value for name, value in touched.items()})


def compress_block(
    job: BlockJob, batches: Batches | None, inputs: Activations | None, outputs: Activations | None
) -> tuple[dict[str, Tensor], Rows]:
    """Compress one block (loaded where there is calibration) and run it, so that later blocks see its error."""
    tensors: dict[str, Tensor] = {}
    rows: Rows = []
    kept: dict[str, Layer] = {}

    def take(site: Site, stats: SiteStats | None) -> None:
        packed, seen = compress_site(job, site, stats, kept)
        tensors.update(packed)
        rows.extend(seen)

    rewrite_block(job, batches, inputs)
    if batches is None or inputs is None or outputs is None:
        for site in job.anatomy.sites:
            take(site, None)
        return tensors, rows

    wanted = [site for site in job.anatomy.sites if any(job.plans[name].alone for name in site.linears)]
    fits = [task for x in job.plans.values() for task in x.together]
    if fits:
        # Targets are those of the block before anything in it is compressed.
        needs = frozenset().union(*(task.needs for task in fits))
        with fitting.observe(job.model, job.index, job.anatomy, batches, inputs, needs) as seen:
            if wanted:
                _compress_sites(job, batches, inputs, None, wanted, take)
            fitted, more = fitting.fit_block(job, batches, inputs, seen, kept)
        tensors.update(fitted)
        rows += more
        for run in through(job.model, job.index, batches, inputs, outputs):
            run()
    else:
        _compress_sites(job, batches, inputs, outputs, wanted, take)
    number = {name: n for n, name in enumerate(name for site in job.anatomy.sites for name in site.linears)}
    return tensors, sorted(rows, key=lambda row: number[row["name"].removeprefix(f"{job.weights.prefix}.")])


def _compress_sites(
    job: BlockJob,
    batches: Batches,
    inputs: Activations,
    outputs: Activations | None,
    wanted: Sequence[Site],
    take: Callable[[Site, SiteStats | None], None],
) -> None:
    """Show every site to `take` with the statistics of its inputs, the sites before it being compressed."""
    skeleton = job.model.skeleton
    runs = through(job.model, job.index, batches, inputs, outputs)
    if job.plan.layout.lockstep:
        current: dict[str, SiteStats] = {}

        def see(site: str, x: Tensor) -> None:
            if site not in current:
                current[site] = fold.init(x.shape[-1], job.needs(job.anatomy.site(site)), skeleton.device)
            current[site] = fold.update(current[site], x)

        def arrived(name: str) -> None:
            site = job.anatomy.site(name)
            state = current.pop(name, None) or fold.init(site.width, job.needs(site), skeleton.device)
            take(site, fold.complete(state, _site(job, name), skeleton.dtype))

        first_pass = through(job.model, job.index, batches, inputs, None)[:1]
        met = order.as_met(job.anatomy, wanted, [job.tap(site) for site in wanted], first_pass)
        lockstep.walk([job.tap(site) for site in met], runs, see, arrived)
    else:
        for wave in order.waves(wanted):
            stats = _collect(job, batches, inputs, wave, {site.name: job.needs(site) for site in wave})
            for site in wave:
                take(site, stats.pop(site.name))
        for run in runs if outputs is not None else ():
            run()


def _block_tensors(job: BlockJob, done: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a block: the compressed ones and the rest as they are, or as folds left them."""
    out = dict(done)
    cut = len(job.weights.prefix) + 1
    untouched = {x.name: x for x in job.plans.values() if not x.tasks}
    for planned in job.plan.of_block(job.index):
        if planned.name in out:
            continue
        if planned.source in untouched:
            linear = untouched[planned.source]
            layer = Layer(linear.name, job.weights.linear(linear.linear))
            out.update(job.exporter.pack(job.plan.outcomes[linear.name], layer))
        else:
            value = job.weights.tensor(planned.source[cut:])
            if job.weights.folded(planned.source[cut:]) and not fits(value, planned.dtype):
                raise overflow(planned.source, planned.dtype)
            out[planned.name] = value.to(planned.dtype).contiguous()
    return out


def _write(job: BlockJob, done: Mapping[str, Tensor], output: Output) -> dict[str, str]:
    tensors = _block_tensors(job, done)
    return output.write(tensors, lambda name: [tensors[name]])


def run(plan: Plan, model: Model, ids: Tensor | None, work: Work, progress: Progress) -> Rows:
    """Carry out a plan, from its first unwritten block on. Returns the report rows of all blocks, in order.

    ids [N, T] are all samples. Each rank takes its share of them through the blocks; the leader writes.
    """
    count = len(model.skeleton.block_names)
    finished = {int(r["block"]): r for r in work.find("block")}
    model = stages.prepared(plan, model, ids, work, progress)
    everything, ids = ids, None if ids is None else ids[ranks.share(len(ids))]
    with torch.no_grad():
        progress.step(len(finished), count)
        if len(finished) < count:
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
        with ranks.together():
            hidden = _hidden(work, count, (*ids.shape, model.skeleton.hidden_size), plan.dtype, create=False)
            if hidden.checksum() != last["hidden"][ranks.rank()]:
                raise LilliputError(
                    f"{hidden.path} is not what the unfinished run wrote (a power failure?); {START_ANEW}"
                )
    tables.compress(plan, model, ids, hidden, work, output, progress)
    if hidden is not None:
        hidden.delete()


def _begin(plan: Plan, model: Model, work: Work, output: Output) -> None:
    """Lay out the files and write what lies outside the blocks, or take up the files of a run that has done so."""
    hashes: dict[str, str] = {}
    begun = bool(work.find("outside"))
    with ranks.together():
        if ranks.lead() and begun:
            output.take_up(work.hashes())
        elif ranks.lead():
            output.lay_out()
            outside = {x.name: x for x in plan.of_block(None) if x.kind != "quantized"}
            hashes = output.write(outside, lambda name: _pieces(outside[name], model))
            memory.trim()
    if not begun:
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


def _hidden(work: Work, block: int, shape: tuple[int, int, int], dtype: torch.dtype, create: bool) -> Activations:
    return Activations(work.folder / f"hidden-{block:04d}.bin", shape, dtype, create=create)


def _blocks(
    plan: Plan,
    model: Model,
    ids: Tensor | None,
    work: Work,
    progress: Progress,
    finished: Mapping[int, Any],
    output: Output,
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
        shape = (len(ids), ids.shape[1], model.skeleton.hidden_size)
        with ranks.together():
            inputs = _hidden(work, start, shape, plan.dtype, create=start == 0)
            work.keep([inputs.path.name, *stages.files(plan), *fisher.kept(work)])
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
            hashes = _write(job, done, output)
        del done
        # Only now is the block finished: its tensors are on the disk, and the next one's inputs with all ranks.
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
    if inputs is not None and not plan.resolved.tables:  # which are made from what the last block has left
        inputs.delete()
