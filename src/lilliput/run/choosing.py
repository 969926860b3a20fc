"""What each grid of a menu would cost each linear, from what was measured, and the choice."""

from __future__ import annotations

import math

from torch import Tensor

from lilliput.budget import curve
from lilliput.machine.cost import Cost
from lilliput.model.weights import Model
from lilliput.plan import choices
from lilliput.plan.choices import Predictions
from lilliput.plan.plan import Plan
from lilliput.progress import Progress
from lilliput.run import passes, sizing, tablescores, trying
from lilliput.run.journal import Work
from lilliput.run.trying import CACHE, Trying
from lilliput.verbs.choose import Choose
from lilliput.verbs.scores import Scores
from lilliput.verbs.spec import Task

_LEAST = 0.05  # of a measured divergence, whatever other roundings of the model's own type take of it


def cost(plan: Plan, task: Task, model: Model) -> Cost:
    """States of all variants on both sides of a block, over the samples of trials, those of all samples, and a block's
    changed weights."""
    skeleton = model.skeleton
    tried = trying.trying(plan, task)
    samples = min(max(task.of(Choose).looked_at(plan.samples, task.options), plan.processes), plan.samples)
    row = plan.tokens * skeleton.hidden_size * skeleton.dtype.itemsize
    variants = tried.before(len(skeleton.block_names))
    most = max(sum(x.linear.parameters for x in plan.resolved.of_block(n)) for n in range(len(skeleton.block_names)))
    return Cost(disk=row * (2 * variants * samples + 2 * plan.samples) + skeleton.dtype.itemsize * most)


def run(plan: Plan, task: Task, model: Model, ids: Tensor | None, work: Work, progress: Progress) -> Plan:
    """The plan with what was chosen. ids [N, T] are all samples."""
    if ids is None:
        raise RuntimeError("a choice by loss was planned, but there are no tokens")
    measure(plan, task, model, ids, work, progress)
    return again(plan, task, model, work)


def again(plan: Plan, task: Task, model: Model, work: Work) -> Plan:
    """The same, from the journal."""

    sized = sizing.sizer(plan, task, model)
    return choices.decided(plan, model, task, predictions(plan, task, work), sized)


def measure(plan: Plan, task: Task, model: Model, ids: Tensor, work: Work, progress: Progress) -> None:
    """Take what the journal does not have yet."""
    if any(r["step"] == task.step for r in work.find("tables")):
        trying.tidy(work.folder, task)
        return
    pool = choices.candidates(plan, task)
    states = trying.take(plan, task, model, ids, work, progress)
    _, many = trying.split(plan, task, ids)
    tables = tablescores.Tables({}, {})
    if any(x.name in pool.options for x in plan.resolved.tables):
        tables = tablescores.scores(plan, task, model, many, states, pool)
    plain = {kind: {name: list(x) for name, x in values.items()} for kind, values in vars(tables).items()}
    work.note({"kind": "tables", "step": task.step, **plain})
    states.delete()


def predictions(plan: Plan, task: Task, work: Work) -> Predictions:
    """By linear, the loss in nats of each entry of the menu, and what losses come to together."""
    tried = trying.trying(plan, task)
    errors = passes.recorded(task, work)
    (record,) = [r for r in work.find("trial") if r["step"] == task.step]
    (tables,) = [r for r in work.find("tables") if r["step"] == task.step]
    losses = [0.0, *(float(x) for x in record["losses"])]  # by variant
    return priced(tried, errors, losses, {name: tuple(x) for name, x in tables["embed"].items()}, tables["head"])


def priced(tried: Trying, errors: Scores, losses: list[float], embed: Scores, head: Scores) -> Predictions:
    """What `predictions` returns; `losses` are the divergences by variant, `errors` and `embed` squared errors and
    `head` nats by linear or table and entry."""
    blocks = 1 + max((x.block for x in tried.groups), default=0)
    null = next((losses[tried.first + n] for n, x in enumerate(tried.groups) if x.null), 0.0)
    prices: dict[str, list[float]] = {}
    total = 0.0
    for number, group in enumerate(tried.groups):
        if group.null:
            continue
        # Roundings differ from the changed block on.
        price = _alone(losses[tried.first + number], null * (1 - group.block / blocks), group.factor)
        total += 0.0 if group.role == CACHE else price
        whole = math.fsum(errors[name][tried.entry[name]] for name in group.names)
        for name in group.names:
            prices[name] = [0.0 if whole <= 0 else price * x / whole for x in errors[name]]
    if tried.table is not None and tried.table.name in embed:
        name = tried.table.name
        price = _alone(losses[tried.first - 1], null, tried.alone)
        prices[name] = [price * x / max(embed[name][tried.entry[name]], 1e-300) for x in embed[name]]
    for name, values in head.items():
        before = prices.get(name, [0.0] * len(values))
        prices[name] = [a + b for a, b in zip(before, values, strict=True)]
    cached = [
        math.fsum(prices[x.names[0]][tried.stored[x.block][n]] for x in tried.groups if x.role == CACHE)
        for n in range(len(tried.whole))
    ]
    points = [(x * x * total + cached[n], losses[n + 1] - null) for n, x in enumerate(tried.whole)]
    return Predictions({name: tuple(x) for name, x in prices.items()}, curve.through(points))


def _alone(loss: float, null: float, factor: float) -> float:
    """What errors cost alone as they are, from their loss when they were `factor` times as large."""
    return max(loss - null, _LEAST * loss) / factor**2
