"""Sparsities of linears, float64, whose mean over all weights is what the recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lilliput.target import Target
from lilliput.verbs.scores import Budget

_HALVINGS = 200  # to the last bit of float64, from any bracket


def refuse(target: Target, options: object = None) -> str | None:
    """Why a step with this target cannot have its sparsity divided, whatever the options of the step that divides."""
    if target.pattern is not None:
        return f"the pattern {target.pattern} fixes the sparsity of every layer: use a sparsity without a pattern"
    if target.sparsity is None:
        return "the step that follows has no sparsity to divide: put the step that prunes after it"
    return None


def weights(budget: Budget) -> Tensor:
    """Number of weights of each linear, [n]."""
    return torch.tensor([float(share.weights) for share in budget.values()], dtype=torch.float64)


def mean(budget: Budget) -> float:
    """The sparsity over all weights that the recipe's targets come to."""
    asked = [float(share.target.sparsity or 0.0) for share in budget.values()]
    sizes = weights(budget)
    return float((sizes * torch.tensor(asked, dtype=torch.float64)).sum() / sizes.sum())


def targets(budget: Budget, sparsities: Mapping[str, float]) -> dict[str, Target]:
    """The recipe's targets with other sparsities, by linear."""
    return {name: share.target.model_copy(update={"sparsity": sparsities[name]}) for name, share in budget.items()}


def met(sparsities: Callable[[float], Tensor], sizes: Tensor, wanted: float, low: float, high: float) -> Tensor:
    """Sparsities [n] whose mean, weighed by `sizes` [n], is `wanted`: `sparsities(x)` rises with x, and x between `low`
    and `high` is found by halving. Where it jumps, what lies on both sides is mixed, so that the mean is exact."""
    sizes = sizes / sizes.sum()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if float((sizes * sparsities(middle)).sum()) < wanted:
            low = middle
        else:
            high = middle
    below, above = sparsities(low), sparsities(high)
    first, last = float((sizes * below).sum()), float((sizes * above).sum())
    part = min(max((wanted - first) / (last - first), 0.0), 1.0) if last > first else 0.0
    return below + part * (above - below)


def divide(shares: Tensor, weights: Tensor, mean: float, spread: float) -> Tensor:
    """Sparsities [n], float64: falling with `shares`, within `spread` of `mean`, whose weighted mean is `mean`."""
    width = float(shares.max() - shares.min())
    if width == 0.0 or spread == 0.0:
        return torch.full_like(shares, mean)
    weights = weights / weights.sum()
    line = mean - 2.0 * spread * (shares - (weights * shares).sum()) / width
    low, high = -2.0 * spread, 2.0 * spread
    for _ in range(100):  # the mean rises with the shift, so halving finds it to the last bit
        shift = (low + high) / 2
        clipped = (line + shift).clamp(mean - spread, mean + spread)
        low, high = (shift, high) if float((weights * clipped).sum()) < mean else (low, shift)
    return (line + (low + high) / 2).clamp(mean - spread, mean + spread)
