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
    seen: list[tuple[Tensor, Tensor]] = []
    attention = skeleton.block(number).get_submodule(entry.attention)
    with ExitStack() as stack, torch.no_grad():
        codec = Watched(lambda k, v: seen.append((k, v)), turned=entry.spec.turns())
        stack.enter_context(caches.tried(attention, lambda: codec, turned=entry.spec.turns()))
        for start, stop in batches.bounds:
            stop = min(stop, most)
            if start >= stop:
                break
            hidden = inputs.read(start, stop).to(skeleton.device)
            calls = skeleton.calls(len(hidden), hidden.shape[1], past=0)
            skeleton.run(number, hidden, calls, cache=filled(skeleton.config, len(hidden), 0))
    keys, values = (
        torch.cat([x[:, :, skipped:].transpose(1, 2).flatten(0, 1) for x in side]) for side in zip(*seen, strict=True)
    )
    if not (bool(keys.isfinite().all()) and bool(values.isfinite().all())):
        raise LilliputError(
            f"keys or values of {name} are not finite: a weight is damaged, or {job.plan.dtype} overflows"
        )
    own = drivers.of(task, CacheDriver).run(task, entry.spec, CacheIO(entry.shape, keys, values))
    full = entry.names(name)
    return {full[key]: x.cpu().contiguous() for key, x in own.items()}
