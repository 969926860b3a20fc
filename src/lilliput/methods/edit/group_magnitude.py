"""Group magnitude: hidden channels and heads of the smallest weights leave, data free.

A unit's score is the norm of all weights that leave with it: of channel j of a gated MLP, row j of gate and up and
column j of down; of a head, its rows in k and v, its queries' rows in q and their columns in o. The result has the same
sizes in every block, so that a stock config holds it.

Paper: Li et al. 2017, arXiv 1608.08710 (norms of filters); groups: Fang et al. 2023, arXiv 2301.12900.
Cost: one reading of the weights. Limits: says nothing of how large a unit's inputs are; weak beside `flap`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Thinning, by_member, thinned


class Options(Thinning):
    """See the module's docstring."""

    norm: Literal[1, 2] = Field(2, description="exponent of the norm")


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """The sum over a unit's weights of |w|^norm, which orders as the norm does."""
    weights: dict[str, Tensor] = {}

    def of(name: str, axis: str, index: slice | Tensor) -> Tensor:
        if name not in weights:
            weights.clear()
            weights[name] = view.weight(name).double().abs().pow(o.norm)
        value = weights[name]
        return value[index].sum(1) if axis == "rows" else value[:, index].sum(0)

    with torch.no_grad():
        return by_member(view, of)


METHOD = Edit(
    paper="Li et al. 2017, arXiv 1608.08710; Fang et al. 2023, arXiv 2301.12900",
    options=Options,
    needs=(),
    covers={
        "group-magnitude": [{"method": "group-magnitude"}],
        "dependency-groups": None,
    },
    sizes=thinned,
    score=score,
)
