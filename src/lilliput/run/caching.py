"""The block loop's side of the verb `cache`: static tensors fitted to what a finished block stores."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from lilliput.anatomy.cached import filled
from lilliput.errors import LilliputError, PlanError
from lilliput.plan import caching
from lilliput.plan.plan import Plan
from lilliput.run import drivers
from lilliput.run.driver import CacheDriver
from lilliput.run.linear import BlockJob
from lilliput.runtime import caches
from lilliput.runtime.caches.watched import Watched
from lilliput.streaming.forward import Batches
from lilliput.streaming.states import Activations
from lilliput.verbs.cache import Cache, CacheIO
from lilliput.verbs.spec import Stage


def long_enough(plan: Plan) -> None:
    """Raises PlanError where a step for the cache leaves out all tokens of a calibration sample."""
    for task in plan.resolved.of(Cache):
        spec = task.of(Cache)
        left_out = spec.skipped(task.options)
        if spec.fit is not None and left_out >= plan.tokens:
            raise PlanError(
                f"{task.label}: it leaves out the first {left_out} tokens of each sample, and a sample has "
                f"{plan.tokens}: give longer samples, or fewer sinks"
            )


def fitting(job: BlockJob) -> bool:
    """Whether some step fits something to what blocks store."""
    return any(x.of(Cache).fit is not None for x in job.plan.resolved.at(Stage.CACHE))


def fit(job: BlockJob, batches: Batches, inputs: Activations) -> dict[str, Tensor]:
    """What the block's step adds to it, by stored name. The block is loaded, and runs with a plain cache meanwhile:
    its outputs are those of the block itself."""
    skeleton, number = job.model.skeleton, job.index
    task = caching.assigned(job.model, job.plan.resolved).get(number)
    if task is None or task.of(Cache).fit is None:
        return {}
    verb, name = task.of(Cache), skeleton.block_names[number]
    entry = caching.entry(job.model, job.plan.resolved, number, task)
    most, skipped = verb.samples(task.options), verb.skipped(task.options)
    weighs = verb.weighs(task.options)
    attention = skeleton.block(number).get_submodule(entry.attention)
    sides: list[tuple[Tensor, ...]] = []  # keys, values, and their squared gradients where those are read

    def see(keys: Tensor, values: Tensor) -> None:
        sides.append((keys, values))

    with ExitStack() as stack, torch.set_grad_enabled(weighs):
        codec = Watched(see, turned=entry.spec.turns(), leaves=weighs)
        stack.enter_context(caches.tried(attention, lambda: codec, turned=entry.spec.turns()))
        slopes = stack.enter_context(_slopes(job, inputs, most)) if weighs else None
        for start, stop in batches.bounds if slopes is None else [(n, n + 1) for n in range(len(inputs))]:
            stop = min(stop, most)
            if start >= stop:
                break
            hidden = inputs.read(start, stop).to(skeleton.device)
            calls = skeleton.calls(len(hidden), hidden.shape[1], past=0)
            out = skeleton.run(number, hidden, calls, cache=filled(skeleton.config, len(hidden), 0))
            if slopes is not None:
                own = sides.pop()
                squares = torch.autograd.grad(out, own, slopes.read(start, stop).to(out))
                sides.append((*(x.detach() for x in own), *(x.square() for x in squares)))
    keys, values, *weights = (
        torch.cat([x[:, :, skipped:].transpose(1, 2).flatten(0, 1) for x in side]) for side in zip(*sides, strict=True)
    )
    if not (bool(keys.isfinite().all()) and bool(values.isfinite().all())):
        raise LilliputError(
            f"keys or values of {name} are not finite: a weight is damaged, or {job.plan.dtype} overflows"
        )
    if not all(bool(x.isfinite().all()) for x in weights):
        raise LilliputError(
            f"squared gradients by keys or values of {name} are not finite: compute in float32 or bfloat16 (dtype), or "
            "leave weigh: fisher out"
        )
    static = drivers.of(task, CacheDriver).run(task, entry.spec, CacheIO(entry.shape, keys, values, *weights))
    full = entry.names(name)
    return {full[key]: x.cpu().contiguous() for key, x in static.items()}


def _slopes(job: BlockJob, inputs: Activations, most: int) -> Activations:
    """The gradient of the loss by what the block gives."""
    if job.slopes is None:
        raise RuntimeError("gradients for the cache were planned and not taken")
    shape = (min(len(inputs), most), *inputs.shape[1:])
    return Activations(job.slopes, shape, torch.float32, create=False)
