"""replace: one line that says what my-method does. Now: linears whose weights are small give up more of them.

replace: the equations. Linear l with n_l weights of mean magnitude m_l and a mean sparsity p over all of them:
s_l = p + c (mean(m) - m_l), means weighted by n_l, c as large as keeps every s_l within `spread` of p.

Paper: replace: authors, year, arXiv number. Cost: one reading of the weights. Limits: looks at weights only.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from lilliput.target import Strict, Target
from lilliput.verbs.allocate import Allocate
from lilliput.verbs.scores import Budget, Scores
from lilliput.verbs.view import BlockIO, BlockView


class Options(Strict):
    """replace: your options, each with a default and a description."""

    spread: float = Field(0.1, ge=0.0, le=0.5, description="largest distance from the mean sparsity")


def refuse(target: Target, o: Options) -> str | None:
    """Why a step with this target cannot be divided."""
    if target.pattern is not None or target.sparsity is None:
        return "the step that follows has no sparsity to divide: put one that prunes without a pattern after it"
    return None


def score(block: BlockView, io: BlockIO, o: Options) -> Scores:
    """For each linear: the mean magnitude of its weights."""
    return {name: (float(weight.double().abs().mean()),) for name, weight in block.weights.items()}


def allocate(scores: Scores, budget: Budget, o: Options) -> Mapping[str, Target]:
    """Sparsities whose mean over all weights is the recipe's."""
    # replace: from here on
    total = sum(share.weights for share in budget.values())
    wanted = sum(share.weights * float(share.target.sparsity or 0.0) for share in budget.values()) / total
    mean = sum(share.weights * scores[name][0] for name, share in budget.items()) / total
    farthest = max(abs(mean - scores[name][0]) for name in budget)
    slope = min(o.spread, wanted, 1.0 - wanted) / farthest if farthest > 0 else 0.0
    return {
        name: share.target.model_copy(update={"sparsity": wanted + slope * (mean - scores[name][0])})
        for name, share in budget.items()
    }


METHOD = Allocate(
    paper="replace: authors, year, arXiv number",
    options=Options,
    needs=(),  # replace: the statistics you read, of lilliput.stats.fold.NAMES
    # replace: a step after it that spends what is divided
    recipe=[
        {"method": "my-method"},
        {"method": "magnitude", "target": {"sparsity": 0.5}},
    ],
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    score=score,
    run=allocate,
    refuse=refuse,
)
