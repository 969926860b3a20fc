"""BESA, in closed form: sparsities of linears by the error that each candidate rate leaves in their outputs.

Each row loses its weights in the order of Wanda's scores. For the candidate rates k / D the output error
e_l(k) = tr((W - W_k) XT X (W - W_k)T) is computed exactly on a sample of rows, as a share of the linear's outputs. Then
the rates of all linears are chosen together so that the summed error, each linear weighed by its number of weights, is
least at exactly the recipe's mean sparsity p: for a price mu of a pruned weight, each takes the rate of least
e_l - mu * k / D on the convex hull of its curve, and mu is found by halving. Rates stay within `spread` of p.

What differs from the paper. There, a block's rates are parameters beta, the rate sum_k beta_k k / D passes gradients
straight through the mask, and sum_l of the block's output error plus lambda (mean rate - p)^2 is minimised by descent,
block by block. Here errors are those of single linears, added up as if they were independent, no descent is needed, and
the mean is exact over the whole model instead of penalised within each block. Rates are per linear and not per row.

Paper: Xu et al. 2024, arXiv 2402.16880; D = 100.
Cost: one more forward pass of the calibration samples through the dense model; for each linear D * rows products of a
row with the Gram matrix. Limits: inputs are those of the dense model, and what later layers make of an error is not
seen; no N:M pattern, which leaves nothing to divide.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from lilliput.target import Strict, Target
from lilliput.verbs import sparsity
from lilliput.verbs.allocate import Allocate
from lilliput.verbs.scores import Budget, Scores
from lilliput.verbs.view import BlockIO, BlockView

_ROOM = 1 << 23  # numbers of the pruned rows that are alive at a time


class Options(Strict):
    """See the module's docstring."""

    rates: int = Field(100, ge=2, le=1000, description="candidate rates: the multiples of 1 / rates")
    looked_at: int = Field(64, ge=1, description="rows of each linear whose errors are computed, evenly spaced")
    spread: float = Field(0.2, ge=0.0, le=1.0, description="largest distance from the mean sparsity")


def score(block: BlockView, io: BlockIO, o: Options) -> Scores:
    """For each linear: the share of its outputs' energy that is lost at the rates 0, 1 / D, ..., 1."""
    scores: dict[str, tuple[float, ...]] = {}
    for name, weight in block.weights.items():
        stats = io.stats[block.anatomy.linear(name).site]
        gram = stats.need("gram") if stats.count else torch.eye(stats.width, device=weight.device)
        rows = torch.linspace(0, len(weight) - 1, min(o.looked_at, len(weight)), device=weight.device).round().long()
        lost = errors(weight[rows], gram, o.rates)
        scores[name] = tuple((lost / lost[-1]).tolist()) if float(lost[-1]) > 0 else (0.0,) * (o.rates + 1)
    return scores


def errors(weight: Tensor, gram: Tensor, rates: int) -> Tensor:
    """Summed output error, float64 [rates + 1], where each row loses its round(width * k / rates) least weights by
    Wanda's score."""
    width = weight.shape[1]
    rank = (weight.abs() * gram.diagonal().sqrt()).argsort(dim=1, stable=True).argsort(dim=1)
    counts = torch.tensor([round(width * k / rates) for k in range(rates + 1)], device=weight.device)
    step = max(1, _ROOM // weight.numel())
    lost = torch.empty(rates + 1, dtype=torch.float64)
    for a in range(0, rates + 1, step):
        pruned = torch.where(rank < counts[a : a + step, None, None], weight, 0.0)
        energy = (pruned @ gram).mul_(pruned).sum((1, 2), dtype=torch.float64)
        lost[a : a + step] = energy.clamp(min=0.0).cpu()
    return lost


def allocate(scores: Scores, budget: Budget, o: Options) -> Mapping[str, Target]:
    """Sparsities whose mean over all weights is the recipe's."""
    mean = sparsity.mean(budget)
    spread = min(o.spread, mean, 1.0 - mean)
    curves = [_hull(_within(scores[name], mean - spread, mean + spread)) for name in budget]
    steepest = max((slope for _, slopes in curves for slope in slopes), default=0.0)
    lowest = min((slope for _, slopes in curves for slope in slopes), default=0.0)

    def at(price: float) -> Tensor:
        """The rates where the next step of every curve costs more than `price`."""
        taken = [rates[sum(slope <= price for slope in slopes)] for rates, slopes in curves]
        return torch.tensor(taken, dtype=torch.float64)

    room = max(abs(steepest), abs(lowest), 1.0)
    divided = sparsity.met(at, sparsity.weights(budget), mean, lowest - room, steepest + room)
    return sparsity.targets(budget, dict(zip(budget, divided.clamp(0.0, 1.0).tolist(), strict=True)))


def _within(curve: tuple[float, ...], low: float, high: float) -> list[tuple[float, float]]:
    """Points (rate, error) of a curve between two rates, whose own errors lie on the line between their neighbours."""
    steps = len(curve) - 1

    def error(rate: float) -> float:
        first = min(int(rate * steps), steps - 1)
        part = rate * steps - first
        return curve[first] + part * (curve[first + 1] - curve[first])

    inside = [(k / steps, curve[k]) for k in range(steps + 1) if low < k / steps < high]
    return [(low, error(low)), *inside, (high, error(high))]


def _hull(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The lower convex hull: its rates, and the slopes between them, which rise."""
    kept: list[tuple[float, float]] = []
    for x, y in points:
        if kept and x <= kept[-1][0]:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], (x, y)):
            kept.pop()
        kept.append((x, y))
    return [x for x, _ in kept], [_slope(a, b) for a, b in itertools.pairwise(kept)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


METHOD = Allocate(
    paper="Xu et al. 2024, arXiv 2402.16880",
    options=Options,
    needs=("gram",),
    covers={"besa": [{"method": "besa"}, {"method": "wanda", "target": {"sparsity": 0.5}}]},
    score=score,
    run=allocate,
    refuse=sparsity.refuse,
)
