"""What each grid of a menu would cost the embedding and the head, from what the last block leaves and how often each
token occurs."""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.anatomy.tables import EMBED, multiplies
from lilliput.machine import ranks
from lilliput.model.weights import TABLE_ROWS, Model
from lilliput.plan.choices import Candidates, numbered
from lilliput.plan.plan import Plan
from lilliput.plan.resolve import LinearPlan
from lilliput.run.heads import head_inputs, lookups, token_counts
from lilliput.run.journal import Work
from lilliput.stats.site import SiteStats
from lilliput.streaming.divergence import spread as uncertainty
from lilliput.streaming.states import Activations
from lilliput.verbs.choose import Choose
from lilliput.verbs.scores import Scores
from lilliput.verbs.spec import Task

_ROWS = 1024  # of a table, drawn by what they matter


def scores(
    plan: Plan,
    task: Task,
    model: Model,
    ids: Tensor,
    states: Activations | None,
    pool: Candidates,
    entries: int,
    work: Work,
) -> Scores:
    """By table, the loss in nats of each entry of the menu. ids [N, T] are all samples, `states` what the last block
    leaves of this rank's."""
    if states is None:
        raise RuntimeError("scores of tables were planned, but nothing ran through the blocks")
    inputs = head_inputs(model, states, frozenset({"gram"}))
    unsure = uncertainty(model.skeleton, model.read, states)
    if ranks.size() > 1:
        unsure = ranks.add(unsure * len(states)) / len(ids)
    often = token_counts(ids[ranks.share(len(ids))], model.vocabulary) + 1.0  # any token may come
    often /= often.sum()
    entering = next((float(r["entering"]) for r in work.find("fisher") if "entering" in r), 0.0)
    result = {}
    for table in plan.resolved.tables:
        if table.name not in pool.options or not ranks.lead():
            continue
        options = pool.options[table.name]
        losses = torch.zeros(len(options), dtype=torch.float64)
        if multiplies(table.linear):
            energy = float(inputs.need("gram").diagonal().sum(dtype=torch.float64)) / max(inputs.count, 1)
            losses += 0.5 * energy * _predicted(task, model, table, inputs, unsure.cpu(), pool)
        if table.linear.role == EMBED:
            width = table.linear.in_features
            plain = lookups(width, frozenset({"gram"}), "cpu")
            each = 0.5 * entering * width * plan.tokens / (plan.tokens - 1)
            losses += each * _predicted(task, model, table, plain, often.cpu(), pool)
        result[table.name] = numbered(entries, options, losses.tolist())
    return result


def _predicted(
    task: Task, model: Model, table: LinearPlan, stats: SiteStats, weights: Tensor, pool: Candidates
) -> Tensor:
    """`score` of the table with these weights of its rows [rows], from rows drawn by them; float64 [options]."""
    count = table.linear.out_features
    weights = torch.nn.functional.pad(weights.double(), (0, max(0, count - len(weights))))[:count]
    total = float(weights.sum())
    sums = weights.cumsum(0)
    at = (torch.arange(_ROWS, dtype=torch.float64) + 0.5) / _ROWS * total
    places = torch.searchsorted(sums, at).clamp_(max=count - 1)
    sample, often = places.unique(return_counts=True)  # type: ignore[no-untyped-call]
    rows = torch.empty(len(sample), table.linear.in_features)
    for start in range(0, count, TABLE_ROWS):
        inside = (sample >= start) & (sample < start + TABLE_ROWS)
        if bool(inside.any()):
            slab = model.read_rows(f"{table.name}.weight", start, min(start + TABLE_ROWS, count))
            rows[inside] = slab[sample[inside] - start].float()
    targets = [target for target, _ in pool.options[table.name].values()]
    spec = task.of(Choose)
    losses = spec.score(rows, stats.to("cpu"), often.float() * (total / _ROWS), targets, task.options)
    return torch.tensor(losses, dtype=torch.float64)
