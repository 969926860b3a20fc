"""replace: one line that says what my-method does. Now: hidden channels of the smallest readers leave.

replace: the equations. The score of channel j is the sum over the linears that read it of |W_:,j|_1.

Paper: replace: authors, year, arXiv number.
Cost: replace: one reading of the weights. Limits: replace: it says nothing of what the channels hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from lilliput.model.edited import Edit as Decision
from lilliput.target import Strict
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Sizes, Units, best_units, thinner


class Options(Strict):
    """replace: your options, each with a default and a description."""

    ratio: float = Field(0.2, ge=0.0, lt=1.0, description="share of the blocks' weights that leaves")


def sizes(units: Sequence[Units], o: Options) -> Sizes:
    """How much stays, from shapes alone. Raises PlanError for a ratio that the hidden channels do not hold."""
    return thinner(units, o.ratio, 8, ("channel",))


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """Scores of one block, by the names that `EditScores` has."""
    scores: dict[str, tuple[float, ...]] = {}
    for number, mlp in enumerate(view.anatomy.groups.channels):
        # replace: from here on
        total = torch.zeros(mlp.width, dtype=torch.float64)
        for name in mlp.readers:
            total += view.weight(name).double().abs().sum(0).cpu()
        scores[f"channels.{number}"] = tuple(total.tolist())
    return scores


def run(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Options) -> Decision:
    """What stays, of exactly these sizes."""
    return best_units(scores, units, sizes)


METHOD = Edit(
    paper="replace: authors, year, arXiv number",
    options=Options,
    needs=(),  # replace: the statistics you read, of lilliput.stats.fold.NAMES
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    sizes=sizes,
    run=run,
    score=score,
)
