"""ASVD's own search for ranks (STRS): every layer at every ratio by itself, and one threshold of perplexity for all.

For each linear that the next step (`svd-truncate`) covers, and each ratio in `ratios`, the perplexity of the whole
model on calibration text when this one alone is truncated. For a threshold p every layer gets the smallest ratio whose
perplexity is at most p, and is left unchanged if there is none. The threshold is the smallest at which all layers
together take no more bytes than with the recipe's ratio for all; bytes fall as p rises, so bisection finds it.

Layers are truncated as the next step does it, with statistics of the uncompressed model's inputs over all calibration
samples; perplexity is taken over a part of the samples (`share`). A ratio j gives the rank j out in / (out + in), whole
and at least 1; one whose factors would be no smaller than the layer is not looked at.

`ranks` decides the same from one forward and one backward pass. Here errors are not modelled: the loss itself is
measured, but for each layer alone, so that interactions of truncations are not seen, and bytes that the threshold
leaves are not spent.

Paper: Yuan et al. 2023, arXiv 2312.05821, whose released code does it so; 32 samples of WikiText-2, ratios 0.1 to 0.9.
Cost: for each candidate a decomposition, and a forward pass from its block on over the samples that are looked at: 9
times half the number of linears in whole passes; one more pass where the truncation reads statistics. Limits: few
samples tell little about layers that matter little, which is most of them at high ratios.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import Field

from lilliput.algebra import lowrank
from lilliput.errors import LilliputError
from lilliput.target import Strict, Target
from lilliput.verbs.scores import Budget, Loss, Share
from lilliput.verbs.search import Search


class Options(Strict):
    """See the module's docstring."""

    ratios: tuple[float, ...] = Field(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), min_length=1, description="ratios to try for each layer"
    )
    share: float = Field(0.25, gt=0.0, le=1.0, description="share of the calibration samples that is used")


def refuse(target: Target, o: Options) -> str | None:
    """Why a step with this target cannot have its ranks searched."""
    wrong = [ratio for ratio in o.ratios if not 0.0 < ratio < 1.0]
    if wrong:
        return f"a ratio of {wrong[0]}: ratios takes numbers above 0 and below 1"
    if target.ratio is None or target.rank is not None:
        return "the step that follows has no ratio to divide: give it target.ratio and no rank, as in svd-truncate"
    if target.ratio < min(o.ratios):
        return f"the smallest ratio tried is {min(o.ratios)}, and {target.ratio} is below it: add smaller ratios"
    return None


def looked_at(samples: int, o: Options) -> int:
    """How many of the calibration samples the losses are taken over; at least 1."""
    return max(1, math.ceil(o.share * samples - 1e-9))


def passes(linears: int, o: Options) -> float:
    """Forward passes through all blocks that trying `linears` linears amounts to."""
    return 1 + linears * len(o.ratios) / 2


def search(loss: Loss, budget: Budget, o: Options) -> tuple[Mapping[str, Target], str]:
    """A rank for each linear that is truncated, ratio 1 for all others, and what was found in words.

    Raises LilliputError where no truncation of single layers leaves a loss that is finite.
    """
    ranks = {name: _ranks(share.shape, o) for name, share in budget.items()}
    remaining = sum(len(some) for some in ranks.values())
    trials: list[tuple[float, str, int]] = []
    for name, some in ranks.items():
        for rank in some:
            remaining -= 1
            value = loss({name: _with(budget[name], rank)}, remaining)
            if math.isfinite(value):
                trials.append((value, name, rank))
    most = sum(_size(share, share.target) for share in budget.values())
    trials.sort(key=lambda x: x[0])
    low, high = 0, len(trials)  # how many of the gentlest truncations the threshold lets through
    while low < high:
        middle = (low + high) // 2
        if _bytes(budget, _least(trials[:middle])) <= most:
            high = middle
        else:
            low = middle + 1
    while 0 < low < len(trials) and trials[low][0] == trials[low - 1][0]:
        low += 1  # a threshold lets all of equal loss through
    decision = _least(trials[:low])
    if _bytes(budget, decision) > most:
        raise LilliputError(
            "too few layers have a finite loss after truncation to reach the ratio: check the calibration "
            "text, or the dtype"
        )
    targets = {name: _with(share, decision.get(name)) for name, share in budget.items()}
    return targets, _said(decision, len(budget), trials[low - 1][0] if low else None)


def _ranks(shape: tuple[int, int], o: Options) -> list[int]:
    """The ranks to try, rising, below the one at which factors are no smaller."""
    rows, width = shape
    candidates = {max(1, math.floor(ratio * rows * width / (rows + width) + 1e-9)) for ratio in o.ratios}
    return sorted(rank for rank in candidates if rank < lowrank.break_even(rows, width))


def _least(trials: Sequence[tuple[float, str, int]]) -> dict[str, int]:
    """The least rank of each layer among those let through."""
    ranks: dict[str, int] = {}
    for _, name, rank in trials:
        ranks[name] = min(rank, ranks.get(name, rank))
    return ranks


def _bytes(budget: Budget, ranks: Mapping[str, int]) -> int:
    return sum(_size(share, _with(share, ranks.get(name))) for name, share in budget.items())


def _with(share: Share, rank: int | None) -> Target:
    return share.target.model_copy(update={"rank": rank, "ratio": 1.0 if rank is None else None})


def _size(share: Share, target: Target) -> int:
    if share.size is None:
        raise RuntimeError("ranks change sizes, but the sizes are missing")
    return share.size(target)


def _said(ranks: Mapping[str, int], count: int, threshold: float | None) -> str:
    if threshold is None:
        return f"asvd-search: all {count} linears fit unchanged."
    return (
        f"asvd-search: {len(ranks)} of {count} linears truncated, each to the smallest rank that alone keeps "
        f"the perplexity on the samples at {math.exp(threshold):.4g} or below."
    )


METHOD = Search(
    paper="Yuan et al. 2023, arXiv 2312.05821",
    options=Options,
    needs=(),
    note="Trials choose the ranks: sizes of single tensors are shown as if all layers had the recipe's ratio, "
    "whose total is the most that will be written.",
    covers={
        "asvd-search": [
            {"method": "asvd-search"},
            {"method": "svd-truncate", "target": {"ratio": 0.8}, "options": {"weighting": "absmean"}},
        ],
    },
    run=search,
    refuse=refuse,
    governs=("svd-truncate",),
    keeps_budget=True,
    looked_at=looked_at,
    passes=passes,
)
