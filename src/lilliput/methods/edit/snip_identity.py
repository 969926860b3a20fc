"""Residual branches that add next to nothing become the identity: attention and MLP of each block, apart.

A branch f of x + f(x) is measured by the mean over tokens of |f(x)| / |x|. Where that is below `threshold`, what f
writes becomes 0: the linear by which it writes to the residual stream, with its bias, and so x + f(x) = x, exactly. All
shapes stay, so every engine opens the result as it opens the original. Zeros take the same bytes and the same time
there. With `shrink` what a silent branch computed leaves as far as it can: one head with its query group, or
`multiple` hidden channels, stay in front of the zeros, and blocks get sizes of their own, as with `uniform: false`:
such a folder is native, smaller and faster, and computes the same.

Paper: Lin et al. 2020, arXiv 2010.01791 (there with a regularizer in training that drives norms down; here as found).
Cost: two forward passes. Limits: branches of a trained model seldom fall below small thresholds; the measure is local:
a small change may matter, and one that a later norm enlarges does. `drop-layers` takes whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lilliput.errors import LilliputError, PlanError
from lilliput.model.edited import Edit as Decision
from lilliput.target import Strict
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Sizes, Units
from lilliput.verbs.sampled import always


class Options(Strict):
    """See the module's docstring."""

    threshold: float = Field(0.05, ge=0.0, description="a branch whose norm over that of the stream is below this goes")
    kinds: tuple[Literal["attention", "mlp"], ...] = Field(("attention", "mlp"), description="branches that may go")
    shrink: bool = Field(False, description="what a silent branch computed leaves too, in a native folder")
    multiple: int = Field(8, ge=1, description="with shrink: hidden channels of a silent MLP that stay")


def sizes(units: Sequence[Units], o: Options) -> Sizes:
    """All that there is, until it is known which branches go. Raises PlanError for what cannot shrink."""
    if not o.shrink:
        return Sizes(len(units))
    first = units[0]
    if len({(x.channels, x.heads) for x in units}) > 1 or len(first.channels) != 1 or not first.heads:
        raise PlanError(
            "snip-identity shrinks blocks that are alike, whose heads can be told apart and that have one MLP, no "
            "experts: leave shrink at false"
        )
    return Sizes(len(units), first.channels[0], first.heads, spread=True, multiple=o.multiple)


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """The measure of each branch that the block has."""
    return {branch: (value,) for branch, value in io.branches.items() if branch in o.kinds}


def run(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Options) -> Decision:
    """The branches below the threshold. Raises LilliputError for NaN."""
    values = {(n, branch): x[branch][0] for n, x in enumerate(scores) for branch in o.kinds if branch in x}
    if any(x != x for x in values.values()):
        raise LilliputError("norms of branches contain NaN: check the weights and the calibration data")
    silent = tuple(place for place, value in values.items() if value < o.threshold)
    blocks = tuple(range(len(units)))
    if not sizes.spread:
        return Decision(blocks, silent=silent)
    heads = {n: (0,) for n, branch in silent if branch == "attention"}
    channels = {(n, 0): tuple(range(min(o.multiple, units[n].channels[0]))) for n, branch in silent if branch == "mlp"}
    return Decision(blocks, channels, heads, spread=True, silent=silent)


METHOD = Edit(
    paper="Lin et al. 2020, arXiv 2010.01791",
    options=Options,
    needs=(),
    covers={"snip-identity": [{"method": "snip-identity", "options": {"threshold": 0.5}}]},
    sizes=sizes,
    run=run,
    score=score,
    branches=always,
)
