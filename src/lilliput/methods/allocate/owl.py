"""OWL: layers whose scores hold more outliers are pruned less, at the same sparsity of the whole model.

Outlier share D_l = share of entries of |W_ij| * |X_j|_2 above m times their mean, over the linears of a block together
(or over each linear by itself). Sparsities fall linearly with it, p_l = p + t - 2 lambda (D_l - mean D) / (max D -
min D), clipped to [p - lambda, p + lambda]; the shift t makes their mean over all weights exactly p. Equal shares give
equal sparsities. p is the sparsity of the pruning step that comes next.

Paper: Yin et al. 2024, arXiv 2310.05175; m = 5, lambda = 0.08.
Cost: one more forward pass of the calibration samples through the dense model, one block resident. Limits: no N:M
pattern, which leaves nothing to divide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.target import Strict, Target
from lilliput.verbs import sparsity
from lilliput.verbs.allocate import Allocate
from lilliput.verbs.scores import Budget, Scores
from lilliput.verbs.view import BlockIO, BlockView


class Options(Strict):
    """`per`: what shares one sparsity, a whole block as in the paper or each linear."""

    multiple: float = Field(5.0, gt=0.0, description="an outlier is this many times the mean score")
    spread: float = Field(0.08, ge=0.0, le=0.5, description="largest distance from the mean sparsity")
    per: Literal["block", "linear"] = Field("block", description="what has one common sparsity")


def score(block: BlockView, io: BlockIO, o: Options) -> Scores:
    """For each linear: entries above the threshold, and all entries."""
    scores = {name: w.abs() * _size(block, io, name).to(w) for name, w in block.weights.items()}
    entries = sum(s.numel() for s in scores.values())
    joint = sum(float(s.sum(dtype=torch.float64)) for s in scores.values()) / max(entries, 1)
    counts: dict[str, tuple[float, ...]] = {}
    for name, s in scores.items():
        mean = joint if o.per == "block" else float(s.mean(dtype=torch.float64))
        counts[name] = (float((s > o.multiple * mean).sum()), float(s.numel()))
    return counts


def allocate(scores: Scores, budget: Budget, o: Options) -> Mapping[str, Target]:
    """Sparsities whose mean over all weights is the recipe's."""
    unit = {name: str(share.block) if o.per == "block" else name for name, share in budget.items()}
    units = list(dict.fromkeys(unit.values()))
    place = {u: i for i, u in enumerate(units)}
    above, entries, weights = (torch.zeros(len(units), dtype=torch.float64) for _ in range(3))
    for name, share in budget.items():
        i = place[unit[name]]
        above[i] += scores[name][0]
        entries[i] += scores[name][1]
        weights[i] += share.weights
    mean = sparsity.mean(budget)
    sparsities = sparsity.divide(above / entries, weights, mean, min(o.spread, mean, 1.0 - mean))
    return sparsity.targets(budget, {name: float(sparsities[place[unit[name]]]) for name in budget})


def _size(block: BlockView, io: BlockIO, name: str) -> Tensor:
    """Norm of each input of a linear over the calibration tokens, up to a factor that all inputs share."""
    return io.stats[block.anatomy.linear(name).site].norms(block.weights[name].device)


METHOD = Allocate(
    paper="Yin et al. 2024, arXiv 2310.05175",
    options=Options,
    needs=("square",),
    covers={
        "owl": [{"method": "owl"}, {"method": "wanda", "target": {"sparsity": 0.7}}],
    },
    score=score,
    run=allocate,
    refuse=sparsity.refuse,
)
