"""The block loop's side of the verb `fit`: a block that can be run with other weights, and what it should give."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lilliput.anatomy.model import Block
from lilliput.model.weights import Model
from lilliput.parts.layer import Layer
from lilliput.run import drivers, rewriting
from lilliput.run.driver import CloseDriver
from lilliput.run.linear import BlockJob, Rows, deliver, lowered
from lilliput.run.running import runner, vectors
from lilliput.stats.site import SiteStats
from lilliput.streaming.collect import collect
from lilliput.streaming.forward import Batches
from lilliput.streaming.states import Activations
from lilliput.verbs.spec import Task
from lilliput.verbs.view import BlockFit, FitBlock, FitIO, Run

TARGETS = "targets.bin"


@dataclass(frozen=True)
class Observed:
    """A block before its steps: how to run it, what it gives (in a file), the statistics of its sites, and its gains
    and biases as they are whenever they are asked for."""

    run: Run
    targets: Activations
    stats: Mapping[str, SiteStats]
    vectors: Callable[[], Mapping[str, Tensor]]


@contextmanager
def observe(
    model: Model, index: int, anatomy: Block, batches: Batches, inputs: Activations, needs: frozenset[str]
) -> Iterator[Observed]:
    """One pass of the loaded block as it is; the file of its outputs, beside `inputs`, goes when the context ends."""
    skeleton = model.skeleton
    run = runner(model, index, anatomy, batches)

    def one(start: int, stop: int) -> Callable[[], None]:
        def forward() -> None:
            targets.write(start, run({}, inputs.read(start, stop).to(skeleton.device)))

        return forward

    targets = Activations(inputs.path.with_name(TARGETS), inputs.shape, torch.float32, create=True)
    try:
        passes = [one(a, b) for a, b in batches.bounds]
        stats = collect(skeleton, index, anatomy.sites, {site.name: needs for site in anatomy.sites}, passes)
        yield Observed(run, targets, stats, partial(vectors, model, index))
    finally:
        targets.delete()


@dataclass(frozen=True)
class Fit:
    """One step's result, and how long it took."""

    result: BlockFit
    seconds: float


def carry_out(
    anatomy: Block,
    batches: Batches,
    inputs: Activations,
    observed: Observed,
    layers: Mapping[str, Layer],
    tasks: Mapping[str, Task],
) -> Iterator[Fit]:
    """The steps of `tasks` (by linear) in their order; the caller installs each result before it asks for the next."""
    piece = max(b - a for a, b in batches.bounds)
    io = FitIO(observed.stats, inputs, observed.targets, piece)
    for step in sorted({task.step for task in tasks.values()}):
        began = time.perf_counter()
        mine = {name: task for name, task in tasks.items() if task.step == step}
        first = next(iter(mine.values()))
        block = FitBlock(anatomy, {name: layers[name] for name in mine}, observed.run, observed.vectors())
        with torch.enable_grad():
            out = drivers.of(first, CloseDriver).run(first, block, io, {n: t.target for n, t in mine.items()})
        if out.layers.keys() != mine.keys():
            raise RuntimeError(f"{first.method.name} was to fit {sorted(mine)} and returned {sorted(out.layers)}")
        yield Fit(out, time.perf_counter() - began)


def fit_block(
    job: BlockJob, batches: Batches, inputs: Activations, observed: Observed, by_name: dict[str, Layer]
) -> tuple[dict[str, Tensor], Rows]:
    """Apply the fit steps to a block whose other steps are done; as `compress_site`, with the block's loss in the rows.

    `kept`: what earlier steps made of its linears; the others come as they are.
    """
    device = torch.device(job.model.skeleton.device)
    plans = {name: x for name, x in job.plans.items() if x.together}
    fresh = {name: x for name, x in plans.items() if name not in by_name}
    layers = {
        name: lowered(Layer(x.name, job.weights.linear(x.linear).to(device)), job.plan.outcomes[x.name].dtype)
        for name, x in fresh.items()
    }
    tasks = {name: x.together[0] for name, x in plans.items()}
    tensors: dict[str, Tensor] = {}
    rows: Rows = []
    for fit in carry_out(job.anatomy, batches, inputs, observed, layers | by_name, tasks):
        if fit.result.folds:
            job.weights.fold(fit.result.folds)
            rewriting.load_folded(job.model.skeleton, job.weights, vectors_only=True)
        for name, layer in fit.result.layers.items():
            plan = job.plans[name]
            share = fit.seconds * plan.linear.parameters / sum(x.weight.numel() for x in fit.result.layers.values())
            stored, row = deliver(job, plan, layer, replace(observed.stats[plan.linear.site], gram=None), share)
            tensors.update(stored)
            rows.append({**row, "block_loss": [fit.result.start, fit.result.end]})
    return tensors, rows
