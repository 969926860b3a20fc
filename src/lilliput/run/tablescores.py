"""What each grid of a menu would cost the embedding and the head, from what the last block leaves and how often each
token occurs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.anatomy.tables import EMBED, multiplies
from lilliput.machine import ranks
from lilliput.model.weights import TABLE_ROWS, Model
from lilliput.plan import choices
from lilliput.plan.candidates import Candidates
from lilliput.plan.choices import numbered
from lilliput.plan.plan import Plan
from lilliput.plan.resolve import LinearPlan
from lilliput.run.heads import head_inputs, lookups, token_counts
from lilliput.stats.site import SiteStats
from lilliput.streaming.divergence import spread as uncertainty
from lilliput.streaming.states import Activations
from lilliput.verbs.choose import Choose
from lilliput.verbs.scores import Scores
from lilliput.verbs.spec import Task

_ROWS = 1024  # of a table, drawn by what they matter


@dataclass(frozen=True)
class Tables:
    """By table and entry of the menu: nats that it costs as a head, and the squared error of the rows of an embedding,
    averaged over tokens."""

    head: Scores
    embed: Scores


def scores(plan: Plan, task: Task, model: Model, ids: Tensor, states: Activations, pool: Candidates) -> Tables:
    """What each entry of the menu costs the tables. ids [N, T] are all samples, `states` [n, T, H] what the last block
    leaves of this rank's samples of the statistics."""
    count = sum(ranks.gathered(len(states)))
    inputs = head_inputs(model, states, frozenset({"gram"}))
    unsure = uncertainty(model.skeleton, model.read, states)
    if ranks.size() > 1:
        unsure = ranks.add(unsure * len(states)) / count
    often = token_counts(ids[ranks.share(len(ids))], model.vocabulary) + 1.0  # any token may come
    often /= often.sum()
    head: dict[str, tuple[float, ...]] = {}
    embed: dict[str, tuple[float, ...]] = {}
    entries = len(choices.entries(task))
    for table in plan.resolved.tables:
        if table.name not in pool.options or not ranks.lead():
            continue
        options = pool.options[table.name]
        if multiplies(table.linear):
            losses = [0.5 * x / max(inputs.count, 1) for x in _errors(task, model, table, inputs, unsure.cpu(), pool)]
            head[table.name] = numbered(entries, options, losses)
        if table.linear.role == EMBED:
            plain = lookups(table.linear.in_features, frozenset({"gram"}), "cpu")
            errors = _errors(task, model, table, plain, often.cpu(), pool)
            embed[table.name] = numbered(entries, options, errors)
    return Tables(head, embed)


def _errors(
    task: Task, model: Model, table: LinearPlan, stats: SiteStats, weights: Tensor, pool: Candidates
) -> tuple[float, ...]:
    """`score` of the table with these weights of its rows [rows], from rows drawn by them."""
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
    return task.of(Choose).score(rows, stats.to("cpu"), targets, often.float() * (total / _ROWS), task.options)
