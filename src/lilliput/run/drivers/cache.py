"""How `cache` is carried out: on a finished block, whose keys and values are watched on the calibration text."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lilliput.machine.cost import Cost
from lilliput.model.stored import Model
from lilliput.plan.plan import Plan
from lilliput.run.driver import CacheDriver
from lilliput.runtime.caches.codec import CodecSpec
from lilliput.verbs.cache import Cache, CacheIO
from lilliput.verbs.spec import Task


def run(task: Task, spec: CodecSpec, io: CacheIO) -> Mapping[str, Tensor]:
    """The static tensors of a block's cache, by their own names."""
    verb = task.of(Cache)
    return {} if verb.fit is None else verb.fit(io, spec, task.options)


def cost(plan: Plan, task: Task, model: Model) -> Cost:
    """What enters and leaves a block."""
    if task.of(Cache).fit is None:
        return Cost()
    return Cost(disk=2 * plan.samples * plan.tokens * model.skeleton.hidden_size * plan.dtype.itemsize)


DRIVER = CacheDriver(verb=Cache, run=run, cost=cost)
