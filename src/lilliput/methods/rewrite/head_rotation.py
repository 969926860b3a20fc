"""Head rotation: what values give to the output projection is turned within each head, so that no channel stands out.

For each key-value head k an orthogonal R_k [h, h]: V_k <- R_kT V_k, its bias alike, and W <- W R_k on the columns of
all query heads that read it. Attention adds up values with one weight for a whole head, so the function stays; the
inputs of the output projection, and cached values, are spread evenly. R_k = diag(s) H / sqrt(h) with random signs s, a
matrix for each head. This is R2 of SpinQuant as it starts out; `spinquant` with `r2: true` learns it with R1, in
place of this step.

Papers: Liu et al. 2024 (SpinQuant), arXiv 2405.16406; Ashkboos et al. 2024 (QuaRot), arXiv 2404.00456.
Cost: no data; products of h x h with two matrices a block while they are read. Limits: heads of a power of two times
factors of 12 and 20, otherwise a random orthogonal matrix serves; squared gradients do not survive it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from lilliput.algebra import hadamard
from lilliput.algebra.rotations import orthogonal
from lilliput.anatomy.model import Anatomy
from lilliput.errors import PlanError
from lilliput.folds.kinds import HeadFold
from lilliput.target import Strict, Target
from lilliput.verbs.rewrite import Rewrite
from lilliput.verbs.view import BlockIO, BlockView


class Options(Strict):
    """`kind`: a Hadamard matrix spreads a single channel evenly; any width has a random orthogonal matrix."""

    kind: Literal["hadamard", "orthogonal"] = Field("hadamard", description="family of the random rotations")
    seed: int = Field(0, ge=0, description="of the signs, or of the matrices")


def refuse(anatomy: Anatomy, o: Options) -> str | None:
    """Why heads of this width have no such rotation."""
    try:
        for size in {link.head for block in anatomy.blocks for link in block.links if link.head}:
            if o.kind == "hadamard":
                hadamard.factor(size)
    except PlanError as error:
        return f"{error} (head-rotation.kind=orthogonal)"
    return None


def rewrite(block: BlockView, io: BlockIO, target: Target, o: Options) -> Sequence[HeadFold]:
    """One fold for each link whose heads can be turned; neither weights nor statistics are looked at."""
    make = hadamard.matrix if o.kind == "hadamard" else orthogonal
    return [
        HeadFold(link, torch.stack([make(link.head, o.seed + n) for n in range(len(link.heads()[0]))]))
        for link in block.anatomy.links
        if link.head
    ]


METHOD = Rewrite(
    paper="Liu et al. 2024, arXiv 2405.16406",
    options=Options,
    needs=(),
    covers={},
    recipe=[
        {"method": "hadamard"},
        {"method": "head-rotation"},
        {"method": "gptq", "target": {"bits": 4}},
    ],
    run=rewrite,
    moves="heads",
    refuse=refuse,
)
