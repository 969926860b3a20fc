"""Shortened LLaMA: whole blocks leave, those whose removal costs least.

By "perplexity" (the default): the cross-entropy of the model on calibration text without each single block; the
cheapest leave together. By "taylor": the sum of |w g| over all weights of a block's linears, g the gradient of the
cross-entropy (Taylor+); the first four and the last two blocks always stay then, as in the paper. With `greedy` the
loss is taken anew after each block that has left, so that two which can only go one at a time do not both go.

Paper: Kim et al. 2024, arXiv 2402.02834.
Cost: "perplexity": half a forward pass of `samples` samples for each block (`greedy`: for each block and each that
leaves); "taylor": one backward pass of them. Limits: one shot; what the blocks did is lost until a repairing step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lilliput.model.edited import Edit as Decision
from lilliput.target import Strict
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Sizes, SkipLoss, Units, highest, stay
from lilliput.verbs.sampled import looked_at

_FIRST, _LAST = 4, 2  # blocks that Taylor+ never removes


class Options(Strict):
    """See the module's docstring."""

    blocks: int = Field(1, ge=0, description="blocks that leave")
    protect: tuple[int, ...] = Field((), description="blocks that stay, by number from 0")
    by: Literal["perplexity", "taylor"] = Field("perplexity", description="what says which blocks are needed least")
    greedy: bool = Field(True, description="perplexity alone: decide one block after the other")
    samples: int = Field(8, ge=1, description="calibration samples that are looked at, at most")


def sizes(units: Sequence[Units], o: Options) -> Sizes:
    """Raises PlanError where too few blocks may leave."""
    return Sizes(stay(units, o.blocks, _protected(len(units), o)))


def _protected(count: int, o: Options) -> tuple[int, ...]:
    """The blocks that stay whatever their scores."""
    edges = (*range(min(_FIRST, count)), *range(max(0, count - _LAST), count)) if o.by == "taylor" else ()
    return tuple(sorted({*edges, *o.protect}))


def gradients(o: Options) -> bool:
    """Whether gradients are read."""
    return o.by == "taylor"


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """The sum of |w g| over a block's linears."""
    total = sum(
        float((view.weight(name) * slope).abs().sum(dtype=slope.double().dtype)) for name, slope in io.gradients.items()
    )
    return {"block": (total,)}


def by_loss(loss: SkipLoss, units: Sequence[Units], sizes: Sizes, o: Options) -> Decision | None:
    """The blocks that stay by the loss without single ones; None where Taylor+ decides."""
    if o.by != "perplexity":
        return None
    gone: set[int] = set()
    leaving = len(units) - sizes.blocks
    costs: list[tuple[float, int]] = []
    for _ in range(leaving if o.greedy else min(leaving, 1)):
        costs = sorted((loss({*gone, n}), n) for n in range(len(units)) if n not in gone and n not in o.protect)
        if o.greedy:
            gone.add(costs[0][1])
    if not o.greedy:
        gone = {n for _, n in costs[:leaving]}
    return Decision(tuple(n for n in range(len(units)) if n not in gone))


def run(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Options) -> Decision:
    """The blocks that stay by Taylor+."""
    protected = _protected(len(units), o)
    free = [n for n in range(len(units)) if n not in protected]
    leaving = {free[n] for n in highest([-scores[n]["block"][0] for n in free], len(units) - sizes.blocks)}
    return Decision(tuple(n for n in range(len(units)) if n not in leaving))


METHOD = Edit(
    paper="Kim et al. 2024, arXiv 2402.02834",
    options=Options,
    needs=(),
    covers={
        "shortened-llama": [{"method": "shortened-llama"}],
    },
    sizes=sizes,
    run=run,
    score=score,
    loss=by_loss,
    gradients=gradients,
    looked_at=looked_at,
)
