"""Outlier Suppression: the gains of norms move into the linears that read them, and inputs are rounded without them.

A norm gives x g + b, and some gains g_j are tens of times the others: they make the outliers that a common scale then
has to cover. Readers get W diag(|g|), and the norm gives x sign(g) + b / |g|. The function stays the same. A gain of 0
stays where it is.

The paper's other half, clipping by the ranges of tokens, is a matter of the grid for inputs: `act-static-dynamic` with
`range: mse` or `percentile`, or `clip` where scales are found at run time.

Paper: Wei et al. 2022, arXiv 2209.13325.
Cost: none. Limits: after norms only, and those whose output no other than linears reads; where a gain makes channels
small instead of large, it moves all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lilliput.folds.kinds import ScaleFold
from lilliput.target import Strict, Target
from lilliput.verbs.rewrite import Rewrite
from lilliput.verbs.view import BlockIO, BlockView

_LEAST, _MOST = 1e-6, 1e6


class Options(Strict):
    """There are none."""


def rewrite(block: BlockView, io: BlockIO, target: Target, o: Options) -> Sequence[ScaleFold]:
    """One fold for each norm that linears read."""
    folds: list[ScaleFold] = []
    for link in block.anatomy.links:
        if link.kind == "norm" and any(name in block.weights for name in link.readers):
            gain = block.gains[link.producer].abs().cpu()
            usable = (gain > _LEAST) & (gain < _MOST)
            folds.append(ScaleFold(link, torch.where(usable, gain, 1.0)))
    return folds


METHOD = Rewrite(
    paper="Wei et al. 2022, arXiv 2209.13325",
    options=Options,
    needs=(),
    covers={
        "outlier-suppression": [
            {"method": "outlier-suppression"},
            {"method": "rtn", "target": {"bits": 8, "group_size": "channel"}},
            {"method": "act-static-dynamic", "options": {"dynamic": False, "range": "mse"}},
        ],
    },
    run=rewrite,
)
