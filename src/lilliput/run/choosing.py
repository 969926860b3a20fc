"""What each grid of a menu would cost each linear: scores from one pass, corrected by a few linears that are really
quantized, and the choice.

The leader quantizes the linears of the trials when the pass goes through their block, where their statistics are at
hand, and keeps their weights in files; afterwards the model runs with each of them alone. Any change at all moves a
model that computes in 16 bits, so each linear is tried with the grid that loses most and with the one that loses least,
and the difference of the two counts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lilliput.machine import memory, ranks
from lilliput.machine.cost import Cost
from lilliput.model.block import BlockWeights
from lilliput.model.weights import Model
from lilliput.parts.layer import Layer
from lilliput.plan import choices
from lilliput.plan.choices import Candidates
from lilliput.plan.plan import Plan
from lilliput.progress import Progress
from lilliput.run import delivery, passes, tablescores
from lilliput.run.journal import Work, save_atomically
from lilliput.streaming import backward
from lilliput.streaming.backward import Samples
from lilliput.streaming.divergence import divergence
from lilliput.streaming.states import Activations
from lilliput.target import Target
from lilliput.verbs.choose import Choose
from lilliput.verbs.compress import Compress
from lilliput.verbs.scores import Scores
from lilliput.verbs.spec import Task
from lilliput.verbs.view import BlockIO, BlockView

_ENDS = ("most", "least")  # of what a linear of a trial may lose
LIMIT = 8.0  # the most by which a prediction is corrected


@dataclass(frozen=True)
class Trial:
    """One linear that is quantized alone, with the smallest and the largest entry that it can have: their numbers in
    the menu, and their targets."""

    number: int
    block: int
    name: str
    entries: tuple[int, int]
    targets: tuple[Target, Target]


def cost(plan: Plan, task: Task, model: Model) -> Cost:
    """States that enter every block, over the samples of trials, and the weights that are tried."""
    skeleton = model.skeleton
    trials = task.of(Choose).trials(task.options)
    states = (len(skeleton.block_names) + 2) * skeleton.hidden_size * skeleton.dtype.itemsize
    widest = max((x.linear.parameters for x in plan.resolved.linears), default=0)
    return Cost(disk=min(trials.samples, plan.samples) * plan.tokens * states + 8 * trials.count * widest)


def run(plan: Plan, task: Task, model: Model, ids: Tensor | None, work: Work, progress: Progress) -> Plan:
    """The plan with what was chosen. ids [N, T] are all samples."""
    if ids is None:
        raise RuntimeError("a choice by loss was planned, but there are no tokens")
    measure(plan, task, model, ids, work, progress)
    return again(plan, task, model, work)


def again(plan: Plan, task: Task, model: Model, work: Work) -> Plan:
    """The same, from the journal."""

    def sized(plan_now: Plan) -> Plan:
        return replace(plan_now, other_bytes=delivery.other_bytes(plan_now, model))

    return choices.decided(plan, model, task, predictions(plan, task, work), sized)


def predictions(plan: Plan, task: Task, work: Work) -> Scores:
    """By linear, the loss in nats of each entry of the menu, corrected by the trials."""
    scores = passes.recorded(task, work)
    by_number = {int(r["number"]): float(r["loss"]) for r in work.find("trial") if r["step"] == task.step}
    planned = trials(plan, task, choices.candidates(plan, task))
    role = {x.name: x.linear.role for x in plan.resolved.linears}
    ratios: dict[int, tuple[str, float]] = {}
    for x in planned:
        predicted = scores[x.name][x.entries[0]] - scores[x.name][x.entries[1]]
        if predicted > 0:
            ratios[x.number] = role[x.name], by_number[x.number] / predicted
    factors = corrections(ratios)
    whole = factors.get("", 1.0)
    return {
        name: tuple(value * factors.get(role[name], whole) for value in values) if name in role else tuple(values)
        for name, values in scores.items()
    }


def corrections(ratios: Mapping[int, tuple[str, float]]) -> dict[str, float]:
    """By role, what predictions are multiplied by, and under "" for roles that were not tried.

    `ratios`: measured over predicted loss with the role of the linear. The geometric mean of a role's ratios counts as
    much as one of all.
    """
    logs: dict[str, list[float]] = defaultdict(list)
    for _, (role, ratio) in sorted(ratios.items()):
        logs[role].append(math.log(min(max(ratio, 1 / LIMIT), LIMIT)))
    every = [x for result in logs.values() for x in result]
    if not every:
        return {}
    mean = math.fsum(every) / len(every)
    result = {role: math.exp((math.fsum(x) + mean) / (len(x) + 1)) for role, x in logs.items()}
    return {"": math.exp(mean), **result}


def trials(plan: Plan, task: Task, pool: Candidates) -> tuple[Trial, ...]:
    """Linears spread over depth and kind."""
    blocks = [[x for x in plan.resolved.of_block(n) if x.name in pool.options] for n in range(_blocks(plan))]
    filled = [n for n, linears in enumerate(blocks) if linears]
    count = task.of(Choose).trials(task.options).count if filled else 0
    planned = []
    for k in range(count):
        block = filled[(2 * k + 1) * len(filled) // (2 * count)]
        linear = blocks[block][3 * k % len(blocks[block])]
        options = pool.options[linear.name]
        ends = min(options, key=lambda j: (options[j][1], j)), max(options, key=lambda j: (options[j][1], j))
        planned.append(Trial(k, block, linear.name, ends, (options[ends[0]][0], options[ends[1]][0])))
    return tuple(planned)


def _blocks(plan: Plan) -> int:
    return 1 + max((x.block for x in plan.resolved.linears), default=-1)


def measure(plan: Plan, task: Task, model: Model, ids: Tensor, work: Work, progress: Progress) -> None:
    """Take the scores and the trials that the journal does not have yet."""
    spec, governed = task.of(Choose), plan.resolved.governed(task)
    pool = choices.candidates(plan, task)
    entries = len(spec.entries(task.options))
    planned = trials(plan, task, pool)
    of_block = {(x.block, x.linear.name): x for x in plan.resolved.linears if x.name in pool.options}

    def score(block: int, view: BlockView, io: BlockIO) -> Scores:
        if io.squares is None:
            raise RuntimeError("squared gradients were planned, and they were not collected")
        scores: dict[str, tuple[float, ...]] = {}
        for name, weight in view.weights.items():
            options = pool.options[of_block[block, name].name]
            stats = io.stats[view.anatomy.linear(name).site].to(weight.device)
            rows = io.squares(name).sum(1).to(weight.device)
            losses = spec.score(weight, stats, rows, [target for target, _ in options.values()], task.options)
            scores[name] = choices.numbered(entries, options, [0.5 * (plan.tokens - 1) * x for x in losses])
            for trial in planned:
                if trial.name == of_block[block, name].name:
                    step, weights = governed[trial.name], BlockWeights(model, block, view.anatomy)
                    trial_weights = {}
                    for which, target in zip(_ENDS, trial.targets, strict=True):
                        layer = Layer(trial.name, weight)
                        value = step.of(Compress).run(layer, stats, target, step.options).decode()
                        stored = weights.to_stored(view.anatomy.linear(name), value)
                        dtype = model.written_dtype(f"{trial.name}.weight")
                        trial_weights[which] = stored.to("cpu", dtype).contiguous()
                    save_atomically(_path(work.folder, task, trial), trial_weights)
        return scores

    def closing(states: Activations | None) -> Scores:
        return tablescores.scores(plan, task, model, ids, states, pool, entries, work)

    tabled = any(x.name in pool.options for x in plan.resolved.tables)
    passes.scores(plan, task, model, ids, work, progress, score, closing if tabled else None)
    _try(plan, task, model, ids, work, progress, planned)


def _path(folder: Path, task: Task, trial: Trial) -> Path:
    return folder / f"choose-{task.step:02d}-{trial.number:03d}.safetensors"


def _try(
    plan: Plan,
    task: Task,
    model: Model,
    ids: Tensor,
    work: Work,
    progress: Progress,
    planned: tuple[Trial, ...],
) -> None:
    """The KL divergence with each linear of a trial alone, over the first samples; each is a record."""
    finished = {int(r["number"]) for r in work.find("trial") if r["step"] == task.step}
    remaining = [x for x in planned if x.number not in finished]
    if remaining:
        count = min(task.of(Choose).trials(task.options).samples, len(ids))
        mine = ids[:count][ranks.share(count)]
        with backward.reruns(model.skeleton, model.read, Samples(mine, work.folder)) as again:
            whole = again(len(model.skeleton.block_names), model.read)
            for trial in remaining:
                name = f"{trial.name}.weight"
                losses = []
                for which in _ENDS:
                    weight = torch.empty(model.shape(name), dtype=model.written_dtype(name))
                    if ranks.lead():
                        weight = load_file(_path(work.folder, task, trial))[which]
                    weight = ranks.same(weight)

                    def read(tensor: str, name: str = name, weight: Tensor = weight) -> Tensor:
                        return weight if tensor == name else model.read(tensor)

                    changed = again(trial.block, read)
                    losses.append(divergence(model.skeleton, model.read, whole, changed) * len(mine))
                total = float(ranks.add(torch.tensor([losses[0] - losses[1]], dtype=torch.float64))) / count
                work.note({"kind": "trial", "step": task.step, "number": trial.number, "loss": max(total, 0.0)})
                progress.step(trial.number + 1, len(planned), "trials")
                memory.trim()
    for trial in planned:
        _path(work.folder, task, trial).unlink(missing_ok=True)
