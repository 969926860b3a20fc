"""Fixed rules for which blocks leave: the last, the first, every other, around the middle, or the least influential.

"top" takes the last blocks, "bottom" the first, "alternate" evenly spaced ones, "symmetric" those in the middle,
"contribution" those whose outputs are most like their inputs: the mean over tokens of the cosine between the two is
highest (block influence: 1 - cosine).

Paper: Sajjad et al. 2020, arXiv 2004.03844; influence: Men et al. 2024, arXiv 2403.03853.
Cost: none, or for "contribution" one forward pass. Limits: what the blocks did is lost; a repairing step wins part of
it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lilliput.model.edited import Edit as Decision
from lilliput.target import Strict
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Sizes, Units, highest, stay


class Options(Strict):
    """See the module's docstring."""

    blocks: int = Field(1, ge=0, description="blocks that leave")
    protect: tuple[int, ...] = Field((), description="contribution alone: blocks that stay, by number from 0")
    rule: Literal["contribution", "top", "bottom", "alternate", "symmetric"] = Field(
        "contribution", description="which blocks leave"
    )


def sizes(units: Sequence[Units], o: Options) -> Sizes:
    """Raises PlanError where no block, or not every protected one, would stay."""
    return Sizes(stay(units, o.blocks, o.protect))


def similar(o: Options) -> bool:
    """Whether the rule asks how alike a block's inputs and outputs are."""
    return o.rule == "contribution"


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """How unlike a block's outputs are to its inputs."""
    return {"block": (0.0 if io.similarity is None else 1.0 - io.similarity,)}


def run(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Options) -> Decision:
    """The blocks that stay."""
    count = len(units)
    if o.rule == "contribution":
        free = [n for n in range(count) if n not in o.protect]
        leaving = {free[n] for n in highest([-scores[n]["block"][0] for n in free], o.blocks)}
    elif o.rule == "top":
        leaving = set(range(count - o.blocks, count))
    elif o.rule == "bottom":
        leaving = set(range(o.blocks))
    elif o.rule == "alternate":
        leaving = {(2 * n + 1) * count // (2 * o.blocks) for n in range(o.blocks)}
    else:
        start = (count - o.blocks) // 2
        leaving = set(range(start, start + o.blocks))
    return Decision(tuple(n for n in range(count) if n not in leaving))


METHOD = Edit(
    paper="Sajjad et al. 2020, arXiv 2004.03844; Men et al. 2024, arXiv 2403.03853",
    options=Options,
    needs=(),
    covers={
        "drop-layers": [{"method": "drop-layers"}],
    },
    sizes=sizes,
    run=run,
    score=score,
    similar=similar,
)
