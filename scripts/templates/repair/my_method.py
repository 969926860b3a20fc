"""replace: one line that says what my-method does. Now: one factor, by least squares.

replace: the equations. With inputs K that stay, W' = a W_K, a = tr(W G_:K W_KT) / tr(W_K G_KK W_KT), G the Gram matrix.

Paper: replace: authors, year, arXiv number.
Cost: replace: one forward pass of a block. Limits: replace: a single number repairs little.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lilliput.target import Strict
from lilliput.verbs.repair import Repair, RepairIO
from lilliput.verbs.view import FitBlock


class Options(Strict):
    """replace: your options, each with a default and a description."""


def repair(block: FitBlock, io: RepairIO, o: Options) -> Mapping[str, Tensor]:
    """New weights [out, in] of the linears that are changed, by name."""
    out: dict[str, Tensor] = {}
    for name, x in io.consumers().items():
        # replace: from here on
        gram, whole = (x.halves[0] + x.halves[1]).double(), x.weight.double()
        kept = whole[:, x.kept]
        above = float(((whole @ gram[:, x.kept]) * kept).sum())
        below = float(((kept @ gram[x.kept][:, x.kept]) * kept).sum())
        out[name] = (kept * (above / below if below > 0 else 1.0)).float()
    return out


METHOD = Repair(
    paper="replace: authors, year, arXiv number",
    options=Options,
    needs=(),
    recipe=[{"method": "flap"}, {"method": "my-method"}],
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    run=repair,
    copies=2,
    looks=lambda options, samples: 0,
)
