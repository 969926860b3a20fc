"""LLM-FP4: for each linear the split of bits, the largest value, and offsets of channels, that suit its inputs best.

A float of b bits has e exponent and m = b - 1 - e mantissa bits. A real-valued exponent bias is the same as a largest
value c, to which its values are scaled. Of all splits and of c = r max|X|, r in 0.02, 0.04, .. 1.2, the pair of least
expected squared error of the inputs is stored.

Channels differ by more than a float of 4 bits spans. So channel j has the grid of the others times 2^-k_j, k_j =
floor(log2(max|X| / max|X_j|)), of 0 to 2^e - 1 (the paper rounds to the nearest k_j, which cuts some channels; here
none is cut by its offset). The powers of two go into the exponents of the weights' columns, which the paper calls a
pre-shifted exponent bias, so that the product has one scale for all inputs; here they stay beside the inputs, which is
the same product. `offsets: false`: one grid for all channels.

The paper minimises the error of the outputs, block by block and alternately for weights and inputs; here it is the
inputs' own, from their histograms, of half octaves.

Paper: Liu et al. 2023, arXiv 2310.16836.
Cost: the inputs' histograms; for each linear 60 roundings of 512 numbers a split and channel. Limits: static. Made for
4 bits, where of e1m2, e2m1 and e3m0 the middle one is usually best; at 8 bits weights of few bits cannot hold offsets.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.parts.inputs import chosen
from lilliput.parts.inputs.chosen import FORM, OFFSET, TOP, ChosenInput
from lilliput.parts.inputs.grid import InputGrid, InputSpec
from lilliput.parts.layer import Layer
from lilliput.stats import bins, pooled
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.inputs import Inputs


class Options(Strict):
    """See the module's docstring."""

    offsets: bool = Field(True, description="a power of two for each channel")


def spec(target: Target, o: Options, width: int) -> InputSpec:
    """The grid. Raises PlanError for what cannot be."""
    if not target.symmetric:
        raise PlanError("floats have no zero points: leave out symmetric: false")
    return ChosenInput(target.bits or 4, o.offsets)


def inputs(layer: Layer, stats: SiteStats, target: Target, o: Options) -> InputGrid:
    """The grid of a layer's inputs."""
    form = ChosenInput(target.bits or 4, o.offsets)
    absmax, histogram = stats.need("absmax"), stats.need("histogram")
    best: tuple[float, int, Tensor, Tensor] | None = None
    for kind in chosen.splits(form.bits):
        shift = _shift(absmax, (1 << chosen.exponents(form.bits, kind)) - 1) if o.offsets else torch.zeros_like(absmax)
        factor = torch.exp2(shift)
        shifted = bins.scaled(histogram, factor) if o.offsets else histogram
        top = (absmax * factor).amax().reshape(1)
        counts = _weighed(shifted, factor)
        error, reached = pooled.searched(counts, top, lambda x, c, kind=kind: chosen.on(x, form.bits, kind, c))  # type: ignore[misc]
        if best is None or error < best[0]:
            best = error, kind, reached, shift
    if best is None:
        raise PlanError(f"no float has {form.bits} bits")
    _, kind, reached, shift = best
    tensors = {FORM: torch.tensor([kind], dtype=torch.uint8), TOP: reached.float().reshape(1).cpu()}
    return InputGrid(form, tensors | {OFFSET: shift.to(torch.uint8).cpu()} if o.offsets else tensors)


def _shift(absmax: Tensor, most: int) -> Tensor:
    """k_j of each channel, float32 [width]; 0 for one that was always 0."""
    ratio = absmax.amax() / absmax.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(absmax > 0, ratio.log2().floor().clamp(0, most), 0.0)


def _weighed(histogram: Tensor, factor: Tensor) -> Tensor:
    """Histograms of shifted channels together, where an error of a channel counts as the one that it becomes."""
    return (histogram.double() / factor.double().square()[:, None]).sum(0, keepdim=True)


METHOD = Inputs(
    paper="Liu et al. 2023, arXiv 2310.16836",
    options=Options,
    needs=("absmax", "histogram"),
    formats=("int",),
    default={"bits": 4},
    covers={
        "llm-fp4": [
            {"method": "rtn", "target": {"format": "e2m1", "group_size": "channel"}},
            {"method": "llm-fp4", "target": {"bits": 4}},
        ],
    },
    run=inputs,
    spec=spec,
)
