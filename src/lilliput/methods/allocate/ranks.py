"""Ranks by sensitivity: each layer gets the rank at which a byte serves it as well as it would serve any other.

For each linear, and each ratio j / steps, the exact error that a truncation of this one alone leaves in its outputs on
the calibration text: with the basis U of the weighting (see svd-truncate) it is e(k) = sum_{i>k} uT_i W G WT u_i, for
all k from one decomposition; `weighting` gram gives the Eckart-Young tail. `measure` loss multiplies it by what the
model's loss makes of a unit of it: with F the mean squared gradients of the weights and g the gradient by an output
y = W x, sum F = E|g|^2 E|x|^2 for independent tokens, and a step d of all outputs moves the loss by
E(g d)^2 ~ E|g|^2 E|d|^2 / rows to second order. Relative divides it by e(0) instead, energy takes it as it is.

    sum        of the remaining steps of all layers, the one that lowers the summed error most for each byte is taken
    threshold  the layer with the largest error goes one step up: in the end one threshold cuts all curves, which is
               what ASVD's binary search over sorted sensitivities (STRS) finds, with its perplexity as the measure

until the bytes are spent that the recipe's ratio, alike for all layers, would take; what is left goes to single ranks.
A layer at the last step is left unchanged. The total is never above those bytes, and misses them by less than one rank
of any open layer.

ASVD releases perplexity of the whole model as default, at one evaluation for each layer and ratio; here one forward and
one backward pass serve for all. Relative errors need no backward pass, and do not see what later layers make of an
error: on a real model they divide ranks worse than alike.

Paper: Yuan et al. 2023, arXiv 2312.05821 (STRS).
Cost: one more forward pass through the dense model, one block resident, a decomposition of each linear; for loss the
backward pass too. Limits: the errors of layers are added as if they were independent, and inputs are those of the
uncompressed model; among a handful of layers the greedy division can miss the best one, among many it comes within a
few percent.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import lowrank
from lilliput.methods.weight.svd_truncate import metric_of
from lilliput.target import Strict, Target
from lilliput.verbs.allocate import Allocate
from lilliput.verbs.scores import Budget, Scores, Share
from lilliput.verbs.view import BlockIO, BlockView


class Options(Strict):
    """See the module's docstring."""

    weighting: Literal["none", "absmean", "gram"] = Field(
        "gram", description="how the measured truncation weights errors; as in the step that truncates"
    )
    alpha: float = Field(0.5, ge=0.0, le=2.0, description="absmean: exponent of mean |x|")
    measure: Literal["loss", "relative", "energy"] = Field(
        "loss", description="errors by their effect on the loss, relative to the layer's own outputs, or absolute"
    )
    rule: Literal["sum", "threshold"] = Field("sum", description="minimise the sum of all errors, or the largest one")
    steps: int = Field(20, ge=2, le=200, description="ratios considered, from 1 / steps to 1")
    fisher_samples: int | None = Field(
        None, ge=1, description="loss: calibration samples for the squared gradients; none: all"
    )


def needs(o: Options) -> tuple[str, ...]:
    """Output errors take the Gram matrix whatever is truncated by."""
    statistics = ("gram", "absmean") if o.weighting == "absmean" else ("gram",)
    return (*statistics, "fisher") if o.measure == "loss" else statistics


def refuse(target: Target, o: Options) -> str | None:
    """Why a step with this target cannot have its ranks divided."""
    if target.ratio is None or target.rank is not None:
        return "the step that follows has no ratio to divide: give it target.ratio and no rank, as in svd-truncate"
    if target.ratio < 1 / o.steps:
        return f"the smallest ratio considered is {1 / o.steps}, and {target.ratio} is below it: give more steps"
    return None


def score(block: BlockView, io: BlockIO, o: Options) -> Scores:
    """For each linear: its outputs, its inputs, and the squared output error at rank 0 and at each ratio below 1."""
    scores: dict[str, tuple[float, ...]] = {}
    for name, weight in block.weights.items():
        stats = io.stats[block.anatomy.linear(name).site]
        gram = stats.need("gram") if stats.count else None
        basis = lowrank.spectrum(weight, metric_of(stats, o.weighting, o.alpha)).basis
        errors = lowrank.tails(weight, basis, gram)
        rows, width = weight.shape
        ranks = [0, *(rank_at(j, o.steps, rows, width) for j in range(1, o.steps))]
        unit = _cost(io, name, gram) / rows if o.measure == "loss" else 1.0
        scores[name] = (float(rows), float(width), *(unit * float(errors[rank]) for rank in ranks))
    return scores


def _cost(io: BlockIO, name: str, gram: Tensor | None) -> float:
    """E|g|^2 of the linear's outputs but for a factor that all linears share; 0 where no token reached it."""
    if io.squares is None:
        raise RuntimeError("squared gradients were planned, and they were not collected")
    energy = 0.0 if gram is None else float(gram.diagonal().sum(dtype=torch.float64))
    return float(io.squares(name).sum(dtype=torch.float64)) / energy if energy > 0 else 0.0


def rank_at(step: int, steps: int, rows: int, width: int) -> int:
    """The rank of a [rows, width] linear at the ratio step / steps; at least 1."""
    return max(1, step * rows * width // (steps * (rows + width)))


@dataclass(frozen=True)
class _Point:
    """A rank (None: as it is), the bytes it takes and the error it leaves."""

    rank: int | None
    size: int
    error: float


def allocate(scores: Scores, budget: Budget, o: Options) -> Mapping[str, Target]:
    """A rank for each linear, or ratio 1 for those that stay; together no more bytes than the recipe's targets take."""
    names = list(budget)
    curves = [_curve(scores[name], share, o) for name, share in budget.items()]
    place = [0] * len(curves)
    room = sum(_size(share, share.target) for share in budget.values()) - sum(curve[0].size for curve in curves)
    heap = [offer for n, curve in enumerate(curves) if (offer := _offer(n, curve, 0, room, o)) is not None]
    heapq.heapify(heap)
    while heap:
        _, n, j = heapq.heappop(heap)
        price = curves[n][j].size - curves[n][place[n]].size
        if price <= room:
            place[n], room = j, room - price
        offer = _offer(n, curves[n], place[n], room, o)  # where the room has shrunk below the price, a shorter step
        if offer is not None:
            heapq.heappush(heap, offer)
    ranks = [curve[j].rank for curve, j in zip(curves, place, strict=True)]
    for n in sorted(range(len(curves)), key=lambda n: (-_next(curves[n], place[n], o), n)):
        rank, share = ranks[n], budget[names[n]]
        if rank is not None:
            before = curves[n][place[n]].size
            rows, width = scores[names[n]][:2]
            ranks[n] = _raised(share, rank, before + room, lowrank.break_even(int(rows), int(width)))
            room -= _size(share, _with(share, ranks[n])) - before
    return {name: _with(budget[name], rank) for name, rank in zip(names, ranks, strict=True)}


def _offer(n: int, curve: Sequence[_Point], at: int, room: int, o: Options) -> tuple[float, int, int] | None:
    """The step of layer n from point `at` that serves best among those that `room` pays for: what a heap takes first.

    The last step, to the layer as it is, is long and takes off all that is left: a curve is not convex there, so that
    a step may pass over points.
    """
    ends = range(at + 1, len(curve)) if o.rule == "sum" else range(at + 1, min(at + 2, len(curve)))
    offers = [(-_gain(curve, at, j, o), n, j) for j in ends if curve[j].size - curve[at].size <= room]
    return min(offers, default=None)


def _next(curve: Sequence[_Point], at: int, o: Options) -> float:
    return _gain(curve, at, at + 1, o) if at + 1 < len(curve) else 0.0


def _gain(curve: Sequence[_Point], at: int, j: int, o: Options) -> float:
    """What orders the step to point j: error taken off for each byte, or the error before it."""
    if o.rule == "threshold":
        return curve[at].error
    return (curve[at].error - curve[j].error) / (curve[j].size - curve[at].size)


def _curve(score: Sequence[float], share: Share, o: Options) -> list[_Point]:
    """Points of rising size and falling error, the last of them the layer as it is."""
    rows, width, total, *errors = score
    scale = (total or 1.0) if o.measure == "relative" else 1.0
    last = _Point(None, _size(share, _with(share, None)), 0.0)
    points: list[_Point] = []
    for j, error in enumerate(errors, 1):
        rank = rank_at(j, o.steps, int(rows), int(width))
        point = _Point(rank, _size(share, _with(share, rank)), error / scale)
        if point.size < last.size and (not points or point.size > points[-1].size):
            points.append(point)
    return [*points, last]


def _raised(share: Share, rank: int, most: int, end: int) -> int:
    """The highest rank from `rank` on, below `end`, whose size is within `most` bytes and smaller than the whole."""
    limit = min(most, _size(share, _with(share, None)) - 1)
    low, high = rank, rank + 1
    while high < end and _size(share, _with(share, high)) <= limit:
        low, high = high, min(2 * high, end)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _size(share, _with(share, middle)) <= limit else (low, middle)
    return low


def _with(share: Share, rank: int | None) -> Target:
    return share.target.model_copy(update={"rank": rank, "ratio": 1.0 if rank is None else None})


def _size(share: Share, target: Target) -> int:
    if share.size is None:
        raise RuntimeError("ranks change sizes, but the sizes are missing")
    return share.size(target)


METHOD = Allocate(
    paper="Yuan et al. 2023, arXiv 2312.05821",
    options=Options,
    needs=("gram", "absmean", "fisher"),
    reads=needs,
    fisher_samples=lambda o: o.fisher_samples,
    note="Calibration chooses the ranks: sizes of single tensors are shown as if all layers had the recipe's ratio, "
    "whose total is the most that will be written.",
    covers={
        "ranks": [
            {"method": "ranks"},
            {"method": "svd-truncate", "target": {"ratio": 0.8}, "options": {"weighting": "gram"}},
        ],
    },
    score=score,
    run=allocate,
    refuse=refuse,
    double=True,
)
