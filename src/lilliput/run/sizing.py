"""What a plan comes to beyond the bytes of its weights: the files beside them or the container around them, and the
time of a decoding step where a step keeps to one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lilliput.efficiency.devices import device
from lilliput.efficiency.planned import decode_seconds
from lilliput.errors import PlanError
from lilliput.export.convert import gguf_model
from lilliput.model.stored import Model
from lilliput.plan.choices import Sized
from lilliput.plan.plan import Plan
from lilliput.run import delivery
from lilliput.verbs.choose import Choose
from lilliput.verbs.spec import Task

GGUF = "gguf"


def sizer(plan: Plan, task: Task, model: Model) -> Sized:
    """A function that completes plans of this model. Raises PlanError for a model that the container cannot hold."""
    header = _header(plan, model) if plan.container == GGUF else 0
    goal = task.of(Choose).goal(task.options)
    named = device(goal.device) if goal.seconds is not None and goal.device is not None else None

    def sized(planned: Plan) -> Plan:
        if planned.container == GGUF:
            planned = replace(planned, other_bytes=header + _data(planned, model) - planned.bytes)
        else:
            planned = replace(planned, other_bytes=delivery.other_bytes(planned, model))
        if named is None:
            return planned
        sizes: dict[str, int] = {}
        for x in planned.tensors:
            if x.kind == "quantized":
                sizes[x.source] = sizes.get(x.source, 0) + x.nbytes
        linears = [(planned.outcomes[name], size) for name, size in sizes.items()]
        return replace(planned, decoding=decode_seconds(model, named, linears, fused=planned.exporter != "lilliput"))

    return sized


def carried_over(model: Model) -> Path | None:
    """The GGUF file that is compressed, whose metadata go into the container."""
    path = Path(model.source.model).expanduser()
    return path if path.suffix == ".gguf" else None


def _header(plan: Plan, model: Model) -> int:
    from lilliput.export.convert import gguf_size

    reason = gguf_model.refuse(model.source.text_config)
    if reason is not None:
        raise PlanError(f"the result cannot be written as {GGUF}: {reason}")
    outcomes = [x for x in plan.outcomes.values() if x.scheme.parts]
    return gguf_size.header_bytes(model.source, carried_over(model), _plain(plan), outcomes)


def _data(plan: Plan, model: Model) -> int:
    from lilliput.export.convert import gguf_size

    outcomes = [x for x in plan.outcomes.values() if x.scheme.parts]
    return gguf_size.data_bytes(model.source.text_config, _plain(plan), outcomes)


def _plain(plan: Plan) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {x.name: (x.dtype, x.shape) for x in plan.tensors if x.kind != "quantized"}
