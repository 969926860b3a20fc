"""Global threshold: one threshold for Wanda scores of the whole model; each linear loses what lies below it.

Scores |W_ij| * |X_j|_2 are divided by their mean over the linear (`normalize`), so that linears of any scale compare.
The threshold is the one below which the recipe's share of all weights lies; a linear's sparsity is the share of its own
scores below it, and at most `most`, so that none is emptied. Which of its weights leave is up to the step that prunes.
Scores are counted in bins of an eighth of a power of two, and lie evenly within their bin: the mean sparsity over all
weights is exactly the recipe's.

Paper: the global scope of magnitude pruning, Han et al. 2015, arXiv 1506.02626, with Wanda's scores, arXiv 2306.11695.
Cost: one more forward pass of the calibration samples through the dense model, one block resident. Limits: scores say
nothing of what later layers make of an error; no N:M pattern, which leaves nothing to divide.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from lilliput.target import Strict, Target
from lilliput.verbs import sparsity
from lilliput.verbs.allocate import Allocate
from lilliput.verbs.scores import Budget, Scores
from lilliput.verbs.view import BlockIO, BlockView

_FINE, _LOWEST, _HIGHEST = 8, -24, 12  # bins of a power of two, and the powers that have some


class Options(Strict):
    """See the module's docstring."""

    normalize: bool = Field(True, description="scores as multiples of their mean over the linear")
    most: float = Field(0.95, gt=0.0, le=1.0, description="highest sparsity that a linear may get")


def refuse(target: Target, o: Options) -> str | None:
    """Why a step with this target cannot have its sparsity divided."""
    reason = sparsity.refuse(target)
    if reason is None and target.sparsity is not None and target.sparsity > o.most:
        return f"a sparsity of {target.sparsity} is above what a linear may get: raise the option 'most' ({o.most})"
    return reason


def score(block: BlockView, io: BlockIO, o: Options) -> Scores:
    """For each linear: weights in each bin of its scores, from the lowest."""
    counts: dict[str, tuple[float, ...]] = {}
    for name, weight in block.weights.items():
        stats = io.stats[block.anatomy.linear(name).site]
        scores = weight.abs() * stats.norms(weight.device)
        if o.normalize:
            scores = scores / scores.mean(dtype=torch.float64).clamp(min=torch.finfo(scores.dtype).tiny).float()
        place = (scores.log2_().sub_(_LOWEST).mul_(_FINE)).clamp_(0, (_HIGHEST - _LOWEST) * _FINE - 1)
        bins = torch.bincount(place.long().flatten(), minlength=(_HIGHEST - _LOWEST) * _FINE)
        counts[name] = tuple(float(x) for x in bins.tolist())
    return counts


def allocate(scores: Scores, budget: Budget, o: Options) -> Mapping[str, Target]:
    """Sparsities whose mean over all weights is the recipe's."""
    bins = torch.tensor([scores[name] for name in budget], dtype=torch.float64)
    below = torch.nn.functional.pad(bins.cumsum(1), (1, 0)) / bins.sum(1, keepdim=True)

    def at(threshold: float) -> Tensor:
        """Share of each linear below a threshold, in bins."""
        first = min(int(threshold), bins.shape[1] - 1)
        part = threshold - first
        return (below[:, first] + part * (below[:, first + 1] - below[:, first])).clamp(max=o.most)

    wanted = sparsity.mean(budget)
    divided = sparsity.met(at, sparsity.weights(budget), wanted, 0.0, float(bins.shape[1]))
    return sparsity.targets(budget, dict(zip(budget, divided.clamp(0.0, 1.0).tolist(), strict=True)))


METHOD = Allocate(
    paper="Han et al. 2015, arXiv 1506.02626; Sun et al. 2024, arXiv 2306.11695",
    options=Options,
    needs=("square",),
    covers={},
    recipe=[{"method": "global-threshold"}, {"method": "wanda", "target": {"sparsity": 0.5}}],
    score=score,
    run=allocate,
    refuse=refuse,
)
