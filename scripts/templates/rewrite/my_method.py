"""replace: one line that says what my-method does. Now: even out the ranges of input channels.

replace: the equations. Channel j of a site, with largest input a_j: s_j = a_j^p, then divided by the geometric mean of
all s; the columns that read the channel are multiplied by s_j, what feeds it is divided.

Paper: replace: authors, year, arXiv number. Cost: O(width) for a link. Limits: looks at inputs only.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from lilliput.folds.kinds import ScaleFold
from lilliput.target import Strict, Target
from lilliput.verbs.rewrite import Rewrite
from lilliput.verbs.view import BlockIO, BlockView


class Options(Strict):
    """replace: your options, each with a default and a description."""

    strength: float = Field(0.5, ge=0.0, le=1.0, description="0 leaves ranges as they are, 1 makes them equal")


def rewrite(block: BlockView, io: BlockIO, target: Target, o: Options) -> Sequence[ScaleFold]:
    """A scale for every link of the block: readers' columns times s, the producer's rows divided by s."""
    folds: list[ScaleFold] = []
    for link in block.anatomy.links:
        # replace: from here on
        stats = io.stats.get(link.site)
        if stats is None or not stats.count:
            continue  # no token came here
        largest = link.tie(stats.need("absmax"))
        largest = largest.clamp_min(max(1e-5 * float(largest.max()), 1e-30))
        scale = largest.pow(o.strength)
        folds.append(ScaleFold(link, scale / scale.log().mean().exp()))
    return folds


METHOD = Rewrite(
    paper="replace: authors, year, arXiv number",
    options=Options,
    needs=("absmax",),  # replace: the statistics you read, of lilliput.stats.fold.NAMES
    baseline=None,  # replace: the method that yours must beat on correlated inputs
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    run=rewrite,
)
