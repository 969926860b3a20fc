"""DSnoT: moves the zeros of a pruned layer until the mean of its outputs is nearly that of the dense one.

Per row, from the mask of an earlier step, with c_j = W_j E[X_j] the mean contribution of an input and eps = sum of c_j
over the pruned weights: while |eps| > threshold, at most `cycles` times, grow the pruned weight whose c_j has the sign
of eps and the largest |c_j| / Var[X_j], prune the kept weight of the opposite sign with the least Wanda score
|W_j| * |X_j|_2, and eps += c_pruned - c_grown. A row stops where eps would change its sign. With N:M the weight to
prune is one of the M inputs of the grown one; a group that has none to give is passed over, and counts as a cycle. No
weight is updated, and values that an earlier step has updated for its own mask become the original ones again.

As eps keeps its sign, so do both orders: a grown weight never is pruned again. Each row's candidates are therefore
sorted once, and a cycle takes the next of each.

Paper: Zhang et al. 2023 (Dynamic Sparse No Training), arXiv 2310.08915; 50 cycles, threshold 0.1.
Cost: a sort of each row, and a few vectors for each cycle. Limits: only the mean of the outputs is mended; where |eps|
starts below the threshold, which is in units of the outputs, a row stays as it is.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import masks
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress


class Options(Strict):
    """See the module's docstring."""

    cycles: int = Field(50, ge=0, le=10000, description="zeros of a row that may move")
    threshold: float = Field(0.1, ge=0.0, description="error of a row's mean output at which it stops")


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with zeros elsewhere. Raises LilliputError for a layer that is not pruned."""
    support = layer.need_support()
    cycles = min(o.cycles, stats.width)
    if stats.count == 0 or cycles == 0:
        return layer.refined(support)
    weight, square = layer.rest(), stats.second_moment()
    mean = stats.need("mean")
    least = torch.finfo(square.dtype).tiny
    variance = (square - mean * mean).clamp(min=0.0)
    given = weight * mean
    error = torch.where(support, 0.0, given).sum(1)
    sign = error.sign()[:, None]
    gain = torch.where(~support & (given * sign > 0), given.abs() / variance.clamp(min=least), -torch.inf)
    price = torch.where(support & (given * sign < 0), weight.abs() * square.sqrt(), torch.inf)
    grown = _first(-gain.clamp(max=torch.finfo(gain.dtype).max), cycles)
    pattern = None if target.pattern is None else masks.pattern_of(target.pattern, stats.width)
    cut = _first(price, cycles) if pattern is None else None
    return layer.refined(_moved(support, given, error, gain, price, grown, cut, pattern, o))


def _first(cost: Tensor, count: int) -> Tensor:
    """Columns of the `count` least entries of each row, in order; the earlier ones first among equals."""
    if count < cost.shape[1]:
        least = masks.largest((-cost).nan_to_num(), count)
        cost = torch.where(least, cost, torch.inf)
    return cost.argsort(dim=1, stable=True)[:, :count]


def _moved(
    support: Tensor,
    given: Tensor,
    error: Tensor,
    gain: Tensor,
    price: Tensor,
    grown: Tensor,
    cut: Tensor | None,
    pattern: tuple[int, int] | None,
    o: Options,
) -> Tensor:
    """The mask after all cycles. `grown`, `cut`: columns [out, cycles] in the order in which they are taken."""
    mask, price, error = support.clone(), price.clone(), error.clone()
    sign = error.sign()
    active = torch.ones_like(error, dtype=torch.bool)
    for cycle in range(grown.shape[1]):
        active = active & (error.abs() > o.threshold)
        if not bool(active.any()):
            break
        grow = grown[:, cycle, None]
        possible = gain.gather(1, grow)[:, 0] > -torch.inf
        active = active & possible
        if cut is not None:
            prune = cut[:, cycle, None]
        else:
            group = pattern[1] if pattern is not None else support.shape[1]
            places = grow // group * group + torch.arange(group, device=grow.device)
            prune = places.gather(1, price.gather(1, places).argmin(1, keepdim=True))
        available = price.gather(1, prune)[:, 0] < torch.inf
        if cut is not None:
            active = active & available
        after = error + (given.gather(1, prune) - given.gather(1, grow))[:, 0]
        flips = after * sign < 0
        moves = active & available & ~flips
        active = active & ~(available & flips)
        error = torch.where(moves, after, error)
        mask.scatter_(1, grow, mask.gather(1, grow) | moves[:, None])
        mask.scatter_(1, prune, mask.gather(1, prune) & ~moves[:, None])
        price.scatter_(1, prune, torch.where(moves[:, None], torch.inf, price.gather(1, prune)))
    return mask


METHOD = Compress(
    paper="Zhang et al. 2023, arXiv 2310.08915",
    options=Options,
    needs=("mean", "square"),
    writes="support",
    refines=True,
    covers={"dsnot": [{"method": "wanda", "target": {"sparsity": 0.5}}, {"method": "dsnot"}]},
    run=compress,
    rowwise=True,
)
