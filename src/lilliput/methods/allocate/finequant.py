"""FineQuant: each matrix gets the largest groups at which smaller ones would no longer narrow the ranges much.

A group of n weights in a row has the range max - min; R_n is their mean over the matrix. From one group per row on,
groups are halved, or cut to the next size that divides the width, for as long as the next size n' has
R_n' <= (1 - fall) R_n. The group size of the quantizing step that comes next is the smallest one, and what every matrix
has where ranges keep falling: the result is never larger than the recipe without this step.

Paper: Kim et al. 2023, arXiv 2308.09723, which states the idea, not the rule; the rule is ours.
Cost: one reading of the weights, no data. Limits: integer formats with scales for groups of a fixed size; ranges say
nothing of what the inputs make of the errors.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from lilliput.target import Strict, Target
from lilliput.verbs.allocate import Allocate
from lilliput.verbs.scores import Budget, Scores
from lilliput.verbs.view import BlockIO, BlockView

SIZES = (16, 32, 64, 128, 256, 512, 1024)


class Options(Strict):
    """See the module's docstring."""

    fall: float = Field(0.1, gt=0.0, lt=1.0, description="share by which ranges must fall to justify smaller groups")


def refuse(target: Target, o: Options) -> str | None:
    """Why a step with this target cannot have its groups chosen."""
    if target.format != "int" or target.bits is None:
        return "the step that follows has no integers whose groups could be chosen: give it target.bits"
    if not isinstance(target.group_size, int) or target.group_size not in SIZES:
        sizes = ", ".join(str(size) for size in SIZES)
        return f"give the step that follows the smallest group that a matrix may have, one of {sizes}"
    return None


def extremes(target: Target, o: Options) -> tuple[Target, ...]:
    """The farthest apart of the targets that linears with this one may get: its own groups, and one per row."""
    return target, target.model_copy(update={"group_size": -1})


def score(block: BlockView, io: BlockIO, o: Options) -> Scores:
    """For each linear: its width, and the mean range at one group per row and at each of `SIZES`, 0 where that does
    not divide the width or is not below it."""
    return {
        name: (float(w.shape[1]), mean_range(w, w.shape[1]), *(_range_at(w, size) for size in SIZES))
        for name, w in block.weights.items()
    }


def _range_at(weight: Tensor, size: int) -> float:
    width = weight.shape[1]
    return mean_range(weight, size) if size < width and width % size == 0 else 0.0


def mean_range(weight: Tensor, size: int) -> float:
    """Mean of max - min over groups of `size` weights, which divides the width."""
    groups = weight.reshape(-1, size)
    return float((groups.amax(1) - groups.amin(1)).double().mean())


def allocate(scores: Scores, budget: Budget, o: Options) -> Mapping[str, Target]:
    """A group size for each linear; -1, as resolved targets have it, is one group per row."""
    targets = {}
    for name, share in budget.items():
        least = share.target.group_size
        assert isinstance(least, int)  # `refuse` has seen to it
        size = choose(scores[name], least, o.fall)
        targets[name] = share.target.model_copy(update={"group_size": -1 if size is None else size})
    return targets


def choose(score: tuple[float, ...], least: int, fall: float) -> int | None:
    """The group size by a linear's score; None for one group per row."""
    _, best, *ranges = score
    at: int | None = None
    for size, mean in sorted(zip(SIZES, ranges, strict=True), reverse=True):
        if mean == 0.0 or size < least:
            continue
        if mean > (1.0 - fall) * best:
            break
        at, best = size, mean
    return at


METHOD = Allocate(
    paper="Kim et al. 2023, arXiv 2308.09723",
    options=Options,
    needs=(),
    note="finequant enlarges groups where that costs little: the files are at most as large as planned",
    covers={
        "finequant": [
            {"method": "finequant"},
            {
                "method": "rtn",
                "target": {"bits": 4, "group_size": 32, "symmetric": True},
                "options": {"importance": False, "search": "minmax"},
            },
        ]
    },
    score=score,
    run=allocate,
    refuse=refuse,
    extremes=extremes,
)
