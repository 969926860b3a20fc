"""replace: one line that says what my-method does. Now: order the residual stream by the energy of its channels.

replace: the equations. Q_i is the permutation matrix that puts the channels entering block i in the order of falling
energy G_jj, equal ones by place; readers W <- W Q_i, writers W <- Q_iT W.

Paper: replace: authors, year, arXiv number.
Cost: one sort for each block. Limits: no recipe runs edits yet; nothing is deleted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lilliput.anatomy.model import Groups
from lilliput.stats.site import SiteStats
from lilliput.target import Strict
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditPlan


class Options(Strict):
    """replace: your options, each with a default and a description."""


def edit(groups: Sequence[Groups], stats: Mapping[str, SiteStats], o: Options) -> EditPlan:
    """What leaves of `groups`, by block, and the bases; stats in order of execution, one for each place.

    Raises ValueError where a place has no statistics.
    """
    if len(stats) != len(groups) + 1:
        raise ValueError(f"{len(groups)} blocks have {len(groups) + 1} boundaries, not {len(stats)}")
    bases = []
    for stat in stats.values():
        # replace: from here on
        order = stat.need("gram").diagonal().argsort(descending=True, stable=True)
        bases.append(torch.eye(len(order), dtype=torch.float64)[order].T.contiguous())
    return EditPlan(bases=tuple(bases))


METHOD = Edit(
    paper="replace: authors, year, arXiv number",
    options=Options,
    needs=("gram",),  # replace: the statistics you read, of lilliput.stats.fold.NAMES
    recipe="replace: why no recipe runs it, or leave this out",
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    run=edit,
)
