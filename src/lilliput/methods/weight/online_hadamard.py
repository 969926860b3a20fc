"""Online Hadamard transforms: inputs are turned while the model runs, so that none stands out when they are rounded.

W x = (W R^-1)(R x) with R = H diag(s) / sqrt(n), H a Hadamard matrix and s random signs. What a later step makes of the
linear, it makes of W R^-1, by the statistics of R x; where inputs are rounded, R x is. Nothing of R but the seed is
stored, and without such steps the linear stays the plain matrix that it was.

By default it stands in front of the linears that read an MLP's hidden channels (R4 of the papers), where no rotation
can be folded into what comes before: a non-linearity is in between. `roles: [down, o]` turns what o reads too.

Papers: Ashkboos et al. 2024 (QuaRot), arXiv 2404.00456; Liu et al. 2024 (SpinQuant), arXiv 2405.16406.
Cost: n (1 + 2 (p + q)) operations a token, p q the order of the transform. Limits: a width n without a large Hadamard
factor takes a dense product across its blocks; masks do not survive, so prune without it; engines' own layouts do not
hold it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lilliput.errors import PlanError
from lilliput.parts.layer import Layer
from lilliput.parts.scheme import Scheme
from lilliput.parts.transform import Rotation
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]


class Options(Strict):
    """`roles`: a step's `where` may leave some of their linears out."""

    roles: tuple[Role, ...] = Field(
        ("down",), min_length=1, description="in front of which linears inputs are transformed"
    )
    seed: int = Field(0, ge=0, description="of the signs")


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """No part, one transform."""
    return Scheme(inputs=(Rotation("hadamard", o.seed),))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a transform in front. Raises PlanError for a mask, which would not survive it."""
    if layer.support is not None:
        raise PlanError(f"{layer.name} is pruned, and a mask does not survive a transform: leave one of the two out")
    return layer.between((Rotation("hadamard", o.seed),))


METHOD = Compress(
    paper="Ashkboos et al. 2024, arXiv 2404.00456",
    options=Options,
    needs=(),
    writes="parts",
    covers={},
    recipe=[
        {"method": "online-hadamard"},
        {"method": "gptq", "target": {"bits": 4, "group_size": "channel"}},
        {"method": "act-static-dynamic", "target": {"bits": 4, "symmetric": False}},
    ],
    run=compress,
    scheme=scheme,
    rowwise=True,
    masked=False,
    roles=lambda o: o.roles,
)
