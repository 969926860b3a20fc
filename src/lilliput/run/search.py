"""The pass of methods that decide by trying: the loss of the whole model with some linears compressed, again and again.

Where the step that is tried out reads statistics, they are those of the model as it is, over all samples, collected
in one pass before the first loss.

Every loss is a record of the journal. A run that goes on asks for the same ones in the same order, so that those which
are known are not taken twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lilliput.anatomy.model import Block
from lilliput.errors import LilliputError, ToldError
from lilliput.machine import memory, ranks
from lilliput.machine.cost import Cost
from lilliput.model.block import BlockWeights
from lilliput.model.weights import Model
from lilliput.parts.layer import Layer
from lilliput.plan.plan import Plan
from lilliput.plan.resolve import LinearPlan
from lilliput.progress import Progress
from lilliput.run.journal import Losses, Work, save_atomically
from lilliput.stats.site import SiteStats
from lilliput.streaming import backward
from lilliput.streaming.backward import Samples
from lilliput.streaming.collect import statistics
from lilliput.streaming.states import Activations
from lilliput.target import Target
from lilliput.verbs.compress import Compress
from lilliput.verbs.scores import Budget
from lilliput.verbs.search import Search
from lilliput.verbs.spec import Task


def cost(plan: Plan, task: Task, model: Model) -> Cost:
    """What is on disk at once while losses are taken: the states that enter every block, statistics, and weights
    that were tried together."""
    skeleton = model.skeleton
    states = (len(skeleton.block_names) + 2) * skeleton.dtype.itemsize
    needs = _needs(plan, task)
    observing = plan.samples * plan.tokens * skeleton.hidden_size * skeleton.dtype.itemsize if needs else 0
    statistics_bytes = plan.processes * sum(_kept(block, needs) for block in model.anatomy().blocks)
    outcomes = [plan.outcomes[name] for name in plan.resolved.governed(task)]
    weights_bytes = sum(x.out_features * x.in_features * x.dtype.itemsize for x in outcomes)
    samples = task.of(Search).looked_at(plan.samples, task.options)
    trying = samples * plan.tokens * skeleton.hidden_size * states + plan.processes * weights_bytes
    return Cost(disk=statistics_bytes + max(observing, trying))


def _needs(plan: Plan, task: Task) -> frozenset[str]:
    """Statistics that the steps read which `task` tries out."""
    return frozenset().union(*(x.needs for x in plan.resolved.governed(task).values()))


def _kept(block: Block, needs: frozenset[str]) -> int:
    """Bytes of a block's statistics."""
    return sum(4 * site.width * (site.width if name == "gram" else 1) for site in block.sites for name in needs)


def search(
    plan: Plan, task: Task, budget: Budget, model: Model, ids: Tensor | None, work: Work, progress: Progress
) -> tuple[Mapping[str, Target], str]:
    """The targets that the step decides on, and what it says of them. ids [N, T] are all samples."""
    recorded = result(plan, task, work)
    if recorded is not None:
        return recorded
    if ids is None:
        raise RuntimeError("losses were planned, but there are no tokens")
    count = task.of(Search).looked_at(plan.samples, task.options)
    backward.tidy(work.folder)
    for path in work.folder.glob("trial-*"):
        path.unlink()  # of a killed run
    try:
        with _Trials(plan, task, model, ids, count, work, progress) as trials:
            targets, note = task.of(Search).run(trials.loss, budget, task.options)
    except LilliputError as error:
        if ranks.lead():
            raise
        raise ToldError(str(error)) from error  # all ranks find the same, and one says it
    changed = {name: _other(target, budget[name].target) for name, target in targets.items()}
    work.note({"kind": "found", "step": task.step, "targets": changed, "said": note})
    return targets, note


def _other(target: Target, before: Target) -> dict[str, Any]:
    """The fields in which it differs."""
    old, new = (x.model_dump(mode="json") for x in (before, target))
    return {key: value for key, value in new.items() if value != old[key]}


def result(plan: Plan, task: Task, work: Work) -> tuple[Mapping[str, Target], str] | None:
    """What `search` has decided in this run or an earlier part of it."""
    for record in work.find("found"):
        if record["step"] == task.step:
            governed = plan.resolved.governed(task)
            targets = {n: governed[n].target.model_copy(update=fields) for n, fields in record["targets"].items()}
            return targets, record["said"]
    return None


class _Trials:
    """Losses of the model under trial over the first `count` samples, of which each rank looks at its share."""

    def __init__(
        self, plan: Plan, task: Task, model: Model, ids: Tensor, count: int, work: Work, progress: Progress
    ) -> None:
        self._plan, self._task, self._model, self._work, self._progress = plan, task, model, work, progress
        self._count = count
        self._every = ids
        self._ids = ids[:count][ranks.share(count)]
        self._needs = _needs(plan, task)
        self._stats: dict[int, Path] = {}
        self._losses = Losses(work, "trial", task.step)
        self._governed = plan.resolved.governed(task)
        self._linears = {x.name: x for x in plan.resolved.linears}
        self._files: dict[tuple[str, Target], Path] = {}
        self._again: Callable[[int, backward.Read], float] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> _Trials:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        for path in (*self._files.values(), *self._stats.values()):
            path.unlink(missing_ok=True)

    def loss(self, changes: Mapping[str, Target], remaining: int) -> float:
        """See `methods.scores.Loss`."""
        value = self._losses.next(lambda: self._measured(changes))
        self._progress.step(self._losses.asked, self._losses.asked + remaining, "losses of candidates")
        return value

    def _measured(self, changes: Mapping[str, Target]) -> float:
        if self._again is None:
            self._observe()
            samples = Samples(self._ids, self._work.folder)
            self._again = self._stack.enter_context(backward.losses(self._model.skeleton, self._model.read, samples))
        names = {f"{name}.weight": name for name in changes}

        def read(tensor: str) -> Tensor:
            if tensor not in names:
                return self._model.read(tensor)
            # One change is tried once; several are changes that were tried before, and will be again.
            return self._compressed(names[tensor], changes[names[tensor]], keep=len(changes) > 1)

        first = min((self._linears[name].block for name in changes), default=len(self._model.skeleton.block_names))
        with torch.no_grad():
            mine = self._again(first, read) * len(self._ids)
        memory.trim()
        return float(ranks.add(torch.tensor([mine], dtype=torch.float64))) / self._count

    def _observe(self) -> None:
        """Collect what the step that is tried out reads, a file for each block."""
        if not self._needs:
            return
        model, mine = self._model, self._every[ranks.share(len(self._every))]
        shape = (len(mine), mine.shape[1], model.skeleton.hidden_size)
        states = Activations(self._work.folder / "trial-states.bin", shape, self._plan.dtype, create=True)
        try:
            with torch.no_grad():
                for block, stats in statistics(model, mine, self._plan.batching.batch, states, self._needs):
                    tensors = {f"{site}.{name}": x.need(name) for site, x in stats.items() for name in self._needs}
                    tensors |= {f"{site}.count": torch.tensor(x.count) for site, x in stats.items()}
                    path = self._work.folder / f"trial-stats-{block:04d}.safetensors"
                    save_atomically(path, {key: x.to("cpu").contiguous() for key, x in tensors.items()})
                    self._stats[block] = path
        finally:
            states.delete()

    def _seen(self, plan: LinearPlan) -> SiteStats:
        """What a linear's inputs were."""
        site, width = plan.linear.site, plan.linear.in_features
        if not self._needs:
            return SiteStats(width, 0)
        with safe_open(self._stats[plan.block], "pt") as file:
            tensors = {name: file.get_tensor(f"{site}.{name}") for name in self._needs}
            return SiteStats(width, int(file.get_tensor(f"{site}.count")), **tensors)

    def _compressed(self, name: str, target: Target, *, keep: bool) -> Tensor:
        """A linear's weight as the next step would leave it, in the orientation of its module."""
        path = self._files.get((name, target))
        if path is not None:
            return load_file(path)["weight"]
        plan, task = self._linears[name], self._governed[name]
        weights = BlockWeights(self._model, plan.block, self._model.anatomy().blocks[plan.block])
        layer = Layer(name, weights.linear(plan.linear).to(weights.device))
        stats = self._seen(plan).to(weights.device)
        weight = task.of(Compress).run(layer, stats, target, task.options).decode()
        stored = weights.to_stored(plan.linear, weight).to("cpu", self._model.written_dtype(f"{name}.weight"))
        if keep:
            path = self._work.folder / f"trial-{len(self._files):05d}.safetensors"
            save_atomically(path, {"weight": stored.contiguous()})
            self._files[name, target] = path
        return stored.contiguous()
