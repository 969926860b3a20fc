"""replace: one line that says what my-method does. Now: lower the rank of the one linear that gains most by it.

replace: the equations. L(l) is the loss with linear l at the rank of a share `kept` of its ranks: of all l with
L(l) < L, the one of least L(l) gets that rank, all others stay whole.

Paper: replace: authors, year, arXiv number. Cost: one forward pass for each linear. Limits: one linear changes at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import Field

from lilliput.target import Strict, Target
from lilliput.verbs.scores import Budget, Loss
from lilliput.verbs.search import Search


class Options(Strict):
    """replace: your options, each with a default and a description."""

    kept: float = Field(0.5, gt=0.0, le=1.0, description="share of the ranks that is tried")
    share: float = Field(1.0, gt=0.0, le=1.0, description="share of the calibration samples that losses are taken over")


def refuse(target: Target, o: Options) -> str | None:
    """Why a step with this target cannot be searched."""
    if target.rank is not None or target.ratio is not None:
        return "the step that follows names its rank already: leave out target.rank and target.ratio, or this step"
    return None


def looked_at(samples: int, o: Options) -> int:
    """How many of the calibration samples the losses are taken over; at least 1."""
    return max(1, math.ceil(o.share * samples - 1e-9))


def passes(linears: int, o: Options) -> float:
    """Forward passes through all blocks that trying `linears` linears amounts to: half of the blocks each."""
    return 1 + linears / 2


def search(loss: Loss, budget: Budget, o: Options) -> tuple[Mapping[str, Target], str]:
    """A target for each linear, and what was found in words."""
    # replace: from here on; ask for losses in an order that only losses decide, so that a killed run can go on
    whole = {name: share.target.model_copy(update={"rank": None, "ratio": 1.0}) for name, share in budget.items()}
    before = loss({}, len(budget))
    trials: list[tuple[float, str, Target]] = []
    for number, (name, share) in enumerate(budget.items()):
        target = share.target.model_copy(update={"rank": max(1, int(o.kept * min(share.shape))), "ratio": None})
        trials.append((loss({name: target}, len(budget) - number - 1), name, target))
    after, name, target = min(trials, key=lambda x: x[:2])
    if not after < before:
        return whole, f"my-method: no linear lowers the loss ({before:.4f})."
    return {**whole, name: target}, f"my-method: {name} to rank {target.rank}, loss {before:.4f} to {after:.4f}."


METHOD = Search(
    paper="replace: authors, year, arXiv number",
    options=Options,
    needs=(),
    recipe=[{"method": "my-method"}, {"method": "laser"}],  # replace: a step after it that is tried out
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    run=search,
    refuse=refuse,
    governs=("laser",),  # replace: the methods that you try out
    looked_at=looked_at,
    passes=passes,
)
