"""OliVe: 4-bit inputs in pairs, where an outlier takes the place of its neighbour.

Neighbours (x_2i, x_2i+1) form a pair. With a static scale s an input is an outlier where |x| > 7 s. A pair without one
holds two integers of -7 .. 7; one code is reserved, as the victim's. In a pair with an outlier the neighbour is the
victim and becomes 0, and the outlier is one of 12, 16, 24, 32, 48, 64, 96 times s, of either sign (a float of 4 bits,
e2m1 with bias 2); of two outliers the larger stays.

`scale: sigma`: 7 s = 3 sigma, with the standard deviation of all inputs of the linear in the calibration text.
`search`: s of least expected squared error, where sizes are distributed as in the histogram of all inputs, and the two
of a pair are independent.

Paper: Guo et al. 2023, arXiv 2304.07493.
Cost: the inputs' means and squares, or their histogram. Limits: 4 bits. Which channels are neighbours is the model's
own order, so that two channels of outliers side by side destroy each other. The paper also has it for weights and, with
other floats, for 8 bits.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.parts.inputs.grid import InputGrid, InputSpec
from lilliput.parts.inputs.pairs import TOP, PairInput, far
from lilliput.parts.inputs.uniform import SCALE
from lilliput.parts.layer import Layer
from lilliput.stats import pooled
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.inputs import Inputs

_STEPS, _OCTAVES = 96, 8


class Options(Strict):
    """See the module's docstring."""

    scale: Literal["sigma", "search"] = Field("sigma", description="three standard deviations, or of least error")


def spec(target: Target, o: Options, width: int) -> InputSpec:
    """The grid. Raises PlanError for other bits than 4."""
    if target.bits != 4:
        raise PlanError(f"outlier-victim pairs have 4 bits, not {target.bits}: set target.bits to 4 or leave it out")
    if not target.symmetric:
        raise PlanError("outlier-victim pairs have no zero points: leave out symmetric: false")
    return PairInput()


def inputs(layer: Layer, stats: SiteStats, target: Target, o: Options) -> InputGrid:
    """The grid of a layer's inputs, with its scale."""
    form = spec(target, o, stats.width)
    scale = _sigma(stats) * 3 / TOP if o.scale == "sigma" else _searched(stats)
    return InputGrid(form, {SCALE: torch.where(scale > 0, scale, 1.0).float().reshape(1).cpu()})


def _sigma(stats: SiteStats) -> Tensor:
    """The standard deviation of all inputs of a linear."""
    mean = stats.need("mean").double().mean()
    return (stats.second_moment().double().mean() - mean.square()).clamp(min=0).sqrt()


def _searched(stats: SiteStats) -> Tensor:
    largest = pooled.largest(stats, 1)
    sizes, counts = pooled.points(pooled.counts(stats.need("histogram"), 1), largest)
    x, share = sizes[0], counts[0] / counts[0].sum().clamp(min=1.0)
    best, least = largest.double(), torch.tensor(torch.inf, dtype=torch.float64, device=x.device)
    for step in range(_STEPS):
        scale = largest.double() / TOP * 2.0 ** (-step * _OCTAVES / _STEPS)
        error = _expected(x / scale, share) * scale.square()
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _expected(x: Tensor, share: Tensor) -> Tensor:
    """The expected squared error of one of a pair, in units of the scale: sizes x [n] with probabilities `share`."""
    near = x <= TOP
    ordinary = torch.where(near, share, 0.0)
    left = ordinary.sum()  # the other is ordinary
    close = (x - x.round()).square()
    beyond = torch.where(near, 0.0, share)
    apart = (x - far(x)).square()
    above = beyond.sum() - beyond.cumsum(0)  # the other is a larger outlier; sizes rise
    alike = beyond / 2  # the other is an outlier of this size: one of the two stays
    lost = above + alike
    whole = ordinary * (left * close + (1 - left) * x.square())
    return (whole + beyond * (lost * x.square() + (1 - lost) * apart)).sum()


def reads(o: Options) -> tuple[str, ...]:
    """What the scale looks at."""
    return ("mean", "square") if o.scale == "sigma" else ("absmax", "histogram")


METHOD = Inputs(
    paper="Guo et al. 2023, arXiv 2304.07493",
    options=Options,
    needs=("mean", "square", "absmax", "histogram"),
    reads=reads,
    formats=("int",),
    default={"bits": 4},
    covers={"olive": [{"method": "rtn", "target": {"bits": 4}}, {"method": "olive", "target": {"bits": 4}}]},
    run=inputs,
    spec=spec,
)
