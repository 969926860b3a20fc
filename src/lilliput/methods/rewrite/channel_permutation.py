"""Channel permutation: hidden channels in an order in which N:M pruning removes less of what matters.

N:M keeps N of every M neighbours in each row, however much the others are worth; which inputs are neighbours is free
wherever the linear before can give its outputs in any order: the hidden channels of an MLP. With S_ij = (|W_ij| /
sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * |X_j|^a, the score of `ria`, channels are dealt round the groups in the order of
sum_i S_ij, so that no group holds several of the heaviest. Then, `rounds` times for each place of a group: the channels
in that place of all groups are taken out, and put back where the sum of all kept scores is largest, a linear
assignment. With T_ig the N-1 largest scores that stay in group g and t_ig the N-th, channel c is worth sum_i T_ig +
max(t_ig, S_ic) there. Rows of the producers and columns of the readers move alike, and the model computes what it did.

Paper: Zhang et al. 2024, Plug-and-Play (RIA); `rounds: 0` is the global shuffle of E-Sparse, Li et al. 2023, arXiv
2310.15929.
Cost: rounds * M products of out * (in / M)^2 comparisons and as many assignments of in / M channels. Limits: the inputs
of other linears have no order of their own: the residual stream's is that of all blocks, heads' that of rotary
positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lilliput.algebra import masks
from lilliput.anatomy.model import Channels
from lilliput.folds.kinds import Fold, PermuteFold
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.rewrite import Rewrite
from lilliput.verbs.view import BlockIO, BlockView

_ROWS = 64  # rows whose scores are compared at a time


class Options(Strict):
    """See the module's docstring."""

    n_of_m: str = Field("2:4", pattern=r"^[1-9]\d*:[1-9]\d*$", description="the pattern of the pruning step to come")
    exponent: float = Field(0.5, ge=0.0, le=2.0, description="of the size of an input in the score")
    rounds: int = Field(1, ge=0, description="passes of assignment over the places of a group; 0: dealt alone")


def rewrite(block: BlockView, io: BlockIO, target: Target, o: Options) -> Sequence[Fold]:
    """One fold for each MLP whose width the pattern divides and whose readers all have groups of it."""
    folds: list[Fold] = []
    n, m = (int(x) for x in o.n_of_m.split(":"))
    for channels in block.anatomy.groups.channels:
        if n < m and channels.width % m == 0 and all(name in block.weights for name in channels.readers):
            folds.append(PermuteFold(channels, ordered(_scores(block, io, channels, o), n, m, o.rounds)))
    return folds


def _scores(block: BlockView, io: BlockIO, channels: Channels, o: Options) -> Tensor:
    """S of all readers, float32 [sum of out, width]."""
    scores = []
    for name in channels.readers:
        size = block.weights[name].abs()
        least = torch.finfo(size.dtype).tiny
        share = size / size.sum(0).clamp(min=least) + size / size.sum(1, keepdim=True).clamp(min=least)
        stats: SiteStats | None = io.stats.get(block.anatomy.linear(name).site)
        if o.exponent and stats is not None and stats.count:
            share = share * stats.second_moment().to(share).pow(o.exponent / 2)
        scores.append(share)
    return torch.cat(scores)


def ordered(score: Tensor, n: int, m: int, rounds: int) -> Tensor:
    """The order int64 [width] of the columns of a score float32 [rows, width] in which n of every m of each row keep
    most. It never keeps less than the order as it is."""
    width = score.shape[1]
    groups = width // m
    heavy = score.sum(0, dtype=torch.float64).argsort(descending=True, stable=True)
    order = heavy.view(m, groups).T.contiguous()  # dealt: one of each m-th of the ranks to a group
    for _ in range(rounds):
        for place in range(m):
            others = torch.cat([order[:, :place], order[:, place + 1 :]], 1)
            _, best = linear_sum_assignment(_worth(score, order[:, place], others, n).cpu().numpy(), maximize=True)
            placed = torch.as_tensor(best, device=order.device).argsort()  # by group, the channel that goes there
            order[:, place] = order[placed, place]
    plain = torch.arange(width, device=score.device)
    result = order.reshape(-1)
    return result if kept(score, result, n, m) > kept(score, plain, n, m) else plain


def kept(score: Tensor, order: Tensor, n: int, m: int) -> float:
    """The sum of the scores that stay when n of every m are kept in this order."""
    mask = masks.choose(score[:, order], None, f"{n}:{m}", "row")
    return float((score[:, order] * mask).sum(dtype=torch.float64))


def _worth(score: Tensor, taken: Tensor, others: Tensor, n: int) -> Tensor:
    """What each channel `taken` [groups] adds to each group of the `others` [groups, m - 1], [groups, groups]."""
    total = torch.zeros(len(taken), len(others), dtype=torch.float64, device=score.device)
    for a in range(0, len(score), _ROWS):
        some = score[a : a + _ROWS]
        best = some[:, others].sort(-1, descending=True).values
        base, last = best[..., : n - 1].sum(-1), best[..., n - 1]  # [rows, groups]
        # Row by row, or the comparisons of all rows would lie in memory at once.
        for values, sums, least in zip(some[:, taken], base, last, strict=True):
            total += torch.maximum(values[:, None], least[None]) + sums[None]
    return total


METHOD = Rewrite(
    paper="Zhang et al. 2024 (ICLR), Plug-and-Play: An Efficient Post-training Pruning Method for LLMs",
    options=Options,
    needs=("square",),
    covers={},
    run=rewrite,
    moves="channels",
)
