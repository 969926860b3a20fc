"""replace: one line that says what my-method does. Now: tokens use the groups that add most on average.

replace: the equations. Groups g of hidden channels have c_tg = |sum over j in g of D_j h_tj|, b_g = mean_t c_tg.

Paper: replace: authors, year, arXiv number.
Cost: replace: two passes of every block. Limits: replace: all tokens use the same groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import contributions
from lilliput.anatomy.model import Anatomy
from lilliput.runtime.behaviours.gates import BIAS, WEIGHT
from lilliput.runtime.behaviours.state import GATES
from lilliput.target import Strict
from lilliput.verbs.behave import Behave, Mlp, MlpIO, Shapes, mlp_of


class Options(Strict):
    """replace: your options, each with a default and a description."""

    keep: float = Field(0.5, gt=0.0, le=1.0, description="share of the groups that a token uses")
    channels: int = Field(8, ge=1, description="hidden channels in a group")


def entry(anatomy: Anatomy, o: Options) -> dict[str, Any]:
    """The config's entry, of a kind that `lilliput.runtime.behaviours` knows. PlanError where the model has no MLPs."""
    mlps = {name: mlp_of(anatomy, number) for number, name in enumerate(anatomy.block_names)}
    return {
        "kind": GATES,
        "blocks": list(anatomy.block_names),
        "keep": o.keep,
        "group_size": o.channels,
        "mlps": {f"{name}.{x.name}": {"rows": list(x.rows), "columns": x.columns} for name, x in mlps.items()},
    }


def tensors(mlp: Mlp, o: Options) -> Shapes:
    """What `fit` returns: dtype and shape by name."""
    groups = -(-mlp.width // o.channels)
    return {WEIGHT: (torch.float32, (groups, mlp.inputs)), BIAS: (torch.float32, (groups,))}


def fit(io: MlpIO, o: Options) -> Mapping[str, Tensor]:
    """A predictor [groups, inputs] and its bias [groups], from what enters the MLP and its last linear."""
    gram = contributions.grams(io.down, o.channels)
    total, count = torch.zeros(len(gram), dtype=torch.float64, device=io.down.device), 0
    # replace: from here on
    for x, hidden in io.passes():
        total += contributions.norms(hidden, gram).sum(0, dtype=torch.float64)
        count += len(x)
    return {WEIGHT: torch.zeros(len(gram), io.mlp.inputs), BIAS: (total / count).float()}


METHOD = Behave(
    paper="replace: authors, year, arXiv number",
    options=Options,
    needs=(),
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    entry=entry,
    fit=fit,
    tensors=tensors,
)
