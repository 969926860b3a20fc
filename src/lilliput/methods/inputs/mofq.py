"""MoFQ: integers or floats of equal width for the inputs of each linear, whichever lose less.

Both grids have one static scale. Integers suit inputs that fill their range evenly, floats those with heavy tails: e4m3
at 8 bits, e3m2 at 6, e2m1 at 4. The patterns that mean infinity or NaN in a float are numbers here, so that e4m3 ends
at 480 before it is scaled. For each of the two the largest value c = r max|X| of least expected squared error is found,
r in 0.02, 0.04, .. 1.2 (`clip: false`: r = 1), and the better of the two is stored.

Of the paper's three measures this is the tensor's own error, from the histogram of half octaves; it also has the error
of the outputs, and of the model. `mofq-weights` chooses for weights.

Paper: Zhang et al. 2023, arXiv 2305.12356.
Cost: the inputs' histogram. Limits: static, one scale for a linear.
"""

from __future__ import annotations

import torch
from pydantic import Field

from lilliput.errors import PlanError
from lilliput.parts.inputs import chosen
from lilliput.parts.inputs.chosen import FORM, INTEGER, TOP, ChosenInput
from lilliput.parts.inputs.grid import InputGrid, InputSpec
from lilliput.parts.layer import Layer
from lilliput.stats import pooled
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.inputs import Inputs

_MANTISSA = {4: 1, 6: 2, 8: 3}


class Options(Strict):
    """See the module's docstring."""

    clip: bool = Field(True, description="search for the largest value that is covered; false: the largest seen")


def spec(target: Target, o: Options, width: int) -> InputSpec:
    """The grid. Raises PlanError for what cannot be."""
    if target.bits not in _MANTISSA:
        raise PlanError(f"{target.bits} bits: integers and floats of equal width have 4, 6 or 8 here")
    if not target.symmetric:
        raise PlanError("floats have no zero points: leave out symmetric: false")
    return ChosenInput(target.bits)


def inputs(layer: Layer, stats: SiteStats, target: Target, o: Options) -> InputGrid:
    """The grid of a layer's inputs."""
    form = spec(target, o, stats.width)
    bits = int(form.bits)
    counts, top = pooled.counts(stats.need("histogram"), 1), pooled.largest(stats, 1)
    steps = pooled.STEPS if o.clip else 0

    def loss(kind: int) -> tuple[float, torch.Tensor]:
        return pooled.searched(counts, top, lambda x, c: chosen.on(x, bits, kind, c), steps)

    found = {kind: loss(kind) for kind in (INTEGER, 1 + _MANTISSA[bits])}
    kind = min(found, key=lambda x: found[x][0])
    reached = found[kind][1].float().reshape(1).cpu()
    return InputGrid(form, {FORM: torch.tensor([kind], dtype=torch.uint8), TOP: reached})


METHOD = Inputs(
    paper="Zhang et al. 2023, arXiv 2305.12356",
    options=Options,
    needs=("absmax", "histogram"),
    formats=("int",),
    covers={
        "mofq": [
            {"method": "mofq-weights", "target": {"bits": 8, "group_size": "channel"}},
            {"method": "mofq", "target": {"bits": 8}},
        ],
    },
    recipe=[
        {"method": "rtn", "target": {"bits": 8, "group_size": "channel"}},
        {"method": "mofq", "target": {"bits": 8}},
    ],
    run=inputs,
    spec=spec,
)
