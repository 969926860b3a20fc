"""An adapter's part of a training step: the folder as a model that stays packed, and the adapter's files beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lilliput.errors import LilliputError
from lilliput.export.provenance import file_sha256
from lilliput.machine import ranks
from lilliput.model.stored import Model
from lilliput.plan import adapting as planning
from lilliput.plan.plan import Plan
from lilliput.plan.resolve import LinearPlan
from lilliput.run.teaching import Teaching
from lilliput.source import layers
from lilliput.training import packed
from lilliput.training.adapted import Adapted
from lilliput.verbs.adapt import Adapt, Adaptable, AdaptIO, settings
from lilliput.verbs.spec import Task


def student(plan: Plan, task: Task, model: Model, before: Model, taught: Teaching) -> Adapted:
    """The folder `model`, its compressed linears as packed as it holds them, with the adapter of `task`."""
    o = settings(task.options)
    skeleton = model.skeleton
    held = [x for x in plan.resolved.linears if packed.is_packed(model.source, plan.outcomes[x.name].stored)]
    coded = {f"{x.name}.weight" for x in held}
    model.load(name for name in skeleton.shapes if name not in coded)
    for x in held:
        outcome = plan.outcomes[x.name]
        shape = outcome.out_features, outcome.in_features
        packed.hold(skeleton, model.source, outcome.stored, x.name, shape, outcome.transposed)
    found = Adapted(skeleton, taught.loss, taught.compared, checkpointing=o.checkpointing)
    torch.manual_seed(o.seed)
    io = AdaptIO(skeleton, tuple(_adaptable(plan, x, model, before) for x in planning.covered(plan.resolved, task)))
    found.adapt(task.of(Adapt).attach(io, task.target, task.options))
    return found


def _adaptable(plan: Plan, x: LinearPlan, model: Model, before: Model) -> Adaptable:
    outcome = plan.outcomes[x.name]

    def decoded() -> Tensor:
        rows, width = outcome.out_features, outcome.in_features
        return layers.layer(model.source, outcome.stored, x.name, rows, width, transposed=outcome.transposed).decode()

    def original() -> Tensor:
        weight = before.read(f"{x.name}.weight").float()
        return weight.T.contiguous() if outcome.transposed else weight

    return Adaptable(x.name, x.block, x.linear, outcome.scheme, decoded, original)


def written(task: Task, student: Adapted, folder: Path, fresh: Path) -> dict[str, str]:
    """The folder `folder` again as `fresh`, byte for byte, and the adapter in it, whose files' hashes are returned; no
    tensor has changed. Of several processes the leader writes.

    Raises LilliputError for an adapter that holds something that is no number.
    """
    adapter = student.adapter
    if adapter is None:
        raise RuntimeError("no adapter was trained")
    for name, value in adapter.named_parameters():
        if value.requires_grad and not bool(value.isfinite().all()):
            raise LilliputError(f"{name} of the adapter is not finite after training: lower lr")
    if not ranks.lead():
        return {}
    shutil.copytree(folder, fresh)
    with _modes_of(fresh):
        place = fresh / settings(task.options).into
        adapter.save(place)
    return {x.relative_to(fresh).as_posix(): file_sha256(x) for x in sorted(place.iterdir())}


def beside(plan: Plan, folder: Path) -> Path | None:
    """Where the folder has the adapter that the plan trains for it; None: the plan trains none."""
    found = (x for x in plan.resolved.tasks if isinstance(x.spec, Adapt))
    return next((folder / settings(x.options).into for x in found), None)


@contextmanager
def _modes_of(folder: Path) -> Iterator[None]:
    """Files that the context writes below the folder can be read by whom the umask lets: safetensors' are for their
    owner alone."""
    yield
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)
