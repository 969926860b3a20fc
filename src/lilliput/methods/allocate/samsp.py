"""SAMSP: linears to which the loss is more sensitive are pruned less, at the same sparsity of the whole model.

Sensitivity s_l of a linear: the mean of its Hessian's diagonal, trace(XT X) / (tokens * inputs), as the paper takes it
(`measure` trace); or the mean square of its outputs, trace(W XT X WT) / (tokens * outputs), which does not change when
scale moves between inputs and weights (energy). Sparsities fall linearly with log s_l, or with s_l, from the recipe's
p: p_l = p + t - 2 lambda (s_l - mean s) / (max s - min s), clipped to [p - lambda, p + lambda]; the shift t makes their
mean over all weights exactly p. Equal sensitivities give equal sparsities.

Paper: Shao et al. 2024 (One-Shot Sensitivity-Aware Mixed Sparsity Pruning), arXiv 2310.09499.
Cost: one more forward pass of the calibration samples through the dense model, one block resident; energy multiplies
each weight by its Gram matrix. Limits: the range lambda and the logarithm are choices made here, since traces differ a
thousandfold between linears; no N:M pattern, which leaves nothing to divide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field

from lilliput.target import Strict, Target
from lilliput.verbs import sparsity
from lilliput.verbs.allocate import Allocate
from lilliput.verbs.scores import Budget, Scores
from lilliput.verbs.view import BlockIO, BlockView


class Options(Strict):
    """See the module's docstring."""

    measure: Literal["trace", "energy"] = Field("trace", description="mean square of inputs, or of outputs")
    scale: Literal["log", "linear"] = Field("log", description="what sparsities fall linearly with")
    spread: float = Field(0.05, ge=0.0, le=0.5, description="largest distance from the mean sparsity")


def reads(o: Options) -> tuple[str, ...]:
    """The statistics that the measure takes."""
    return ("square",) if o.measure == "trace" else ("gram",)


def score(block: BlockView, io: BlockIO, o: Options) -> Scores:
    """For each linear its sensitivity; 0 where no token reached it."""
    scores: dict[str, tuple[float, ...]] = {}
    for name, weight in block.weights.items():
        stats = io.stats[block.anatomy.linear(name).site]
        if not stats.count:
            scores[name] = (0.0,)
        elif o.measure == "trace":
            scores[name] = (float(stats.second_moment().mean(dtype=torch.float64)),)
        else:
            energy = (weight @ stats.need("gram")).mul_(weight).sum(dtype=torch.float64)
            scores[name] = (float(energy) / (stats.count * weight.shape[0]),)
    return scores


def allocate(scores: Scores, budget: Budget, o: Options) -> Mapping[str, Target]:
    """Sparsities whose mean over all weights is the recipe's."""
    sensitivity = torch.tensor([scores[name][0] for name in budget], dtype=torch.float64)
    if o.scale == "log":
        positive = sensitivity[sensitivity > 0]
        least = float(positive.min()) if len(positive) else 1.0
        sensitivity = sensitivity.clamp(min=least).log()
    mean = sparsity.mean(budget)
    spread = min(o.spread, mean, 1.0 - mean)
    divided = sparsity.divide(sensitivity, sparsity.weights(budget), mean, spread)
    return sparsity.targets(budget, dict(zip(budget, divided.tolist(), strict=True)))


METHOD = Allocate(
    paper="Shao et al. 2024, arXiv 2310.09499",
    options=Options,
    needs=("square", "gram"),
    reads=reads,
    covers={},
    recipe=[{"method": "samsp"}, {"method": "isc", "target": {"sparsity": 0.5}}],
    score=score,
    run=allocate,
    refuse=sparsity.refuse,
)
