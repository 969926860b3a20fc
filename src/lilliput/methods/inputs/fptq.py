"""FPTQ: 8-bit inputs with a static scale where their range is small, and one for each token where it is large.

The paper sorts linears by v = max|X| over the calibration text. v < 15: one static scale for all inputs. 15 <= v < 150:
first each channel is divided by s_j = max|X_j| / log2(2 + max|X_j|), which moves into the weights ("logarithmic
activation equalization"), then a static scale. v >= 150: a scale for each token.

The division is a rewrite that has to come before any weight is quantized: `smoothquant` with `scale: fptq`, which
leaves inputs outside 15 .. 150 alone. What it has divided by s reaches at most log2(152) = 7.2, so that here one cut
decides: below `cut` the scale is static, else, where inputs are large or no norm could take s, it is the token's.

Paper: Li et al. 2023, arXiv 2308.15987 (the cuts are as its text gives them).
Cost: the inputs' extremes. Limits: made for 4-bit weights in groups and 8-bit inputs.
"""

from __future__ import annotations

import torch
from pydantic import Field

from lilliput.errors import PlanError
from lilliput.parts.inputs.grid import InputGrid, InputSpec
from lilliput.parts.inputs.policy import MODE, PolicyInput
from lilliput.parts.inputs.uniform import SCALE, UniformInput
from lilliput.parts.layer import Layer
from lilliput.stats import pooled
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.inputs import Inputs
from lilliput.verbs.spec import Steps


class Options(Strict):
    """See the module's docstring."""

    cut: float = Field(15.0, ge=0.0, description="the largest input from which on each token has a scale")


def spec(target: Target, o: Options, width: int) -> InputSpec:
    """The grid. Raises PlanError for what cannot be."""
    if not target.symmetric:
        raise PlanError("fptq is symmetric: leave out symmetric: false, or take act-static-dynamic")
    return PolicyInput(target.bits or 8)


def inputs(layer: Layer, stats: SiteStats, target: Target, o: Options) -> InputGrid:
    """The grid of a layer's inputs."""
    form = PolicyInput(target.bits or 8)
    low, high = pooled.extremes(stats, 1)
    scale, _ = UniformInput(form.bits).parameters(low, high)
    mode = (torch.maximum(-low, high) >= o.cut).to(torch.uint8)
    return InputGrid(form, {MODE: mode.cpu(), SCALE: scale.float().cpu()})


_RECIPE: Steps = [
    {"method": "smoothquant", "options": {"scale": "fptq"}},
    {"method": "rtn", "target": {"bits": 4}},
    {"method": "fptq"},
]

METHOD = Inputs(
    paper="Li et al. 2023, arXiv 2308.15987",
    options=Options,
    needs=("low", "high"),
    formats=("int",),
    covers={"fptq": _RECIPE},
    run=inputs,
    spec=spec,
)
