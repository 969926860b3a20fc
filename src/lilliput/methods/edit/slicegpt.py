"""SliceGPT's bases at 0 % slicing: each block sees the residual stream along its principal directions.

Q_i = eigenvectors of the Gram matrix of the normalised residual stream that enters block i (Q_n: the final norm), in
float64, largest first. Readers W <- W Q_i, writers W <- Q_iT W, embedding E <- E Q_0, head W <- W Q_n; between blocks
the skip connection is multiplied by Q_iT Q_(i+1). Nothing is deleted: the logits stay.

Paper: Ashkboos et al. 2024, arXiv 2401.15024; one basis for each block, not for each half of it.
Cost: one eigendecomposition of the width for each block. Limits: not run by recipes: the transforms between blocks have
no place in an engine's layout, and deleting directions is not done here. RMS norms without post-norms only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lilliput.algebra.rotations import principal
from lilliput.anatomy.model import Groups
from lilliput.stats.site import SiteStats
from lilliput.target import Strict
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditPlan


class Options(Strict):
    """There is nothing to choose while nothing is deleted."""


def edit(groups: Sequence[Groups], stats: Mapping[str, SiteStats], o: Options) -> EditPlan:
    """groups: what may leave together, by block (nothing does here). stats: in order of execution, of the normalised
    residual stream that enters each block, and of what enters the final norm."""
    if len(stats) != len(groups) + 1:
        raise ValueError(
            f"{len(groups)} blocks have {len(groups) + 1} boundaries, but there are {len(stats)} statistics"
        )
    return EditPlan(bases=tuple(principal(x.need("gram")) for x in stats.values()))


METHOD = Edit(
    paper="Ashkboos et al. 2024, arXiv 2401.15024",
    options=Options,
    needs=("gram",),
    recipe="the transforms that it puts between blocks have no place in any layout that is written here yet",
    covers={},
    run=edit,
)
