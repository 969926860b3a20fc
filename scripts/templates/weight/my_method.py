"""replace: one line that says what my-method does. Now: round to nearest on a narrowed range.

replace: the equations. Unit u of weights that share a scale S (and zero point Z), narrowing c: S <- c S;
q = clip(round(w / S) + Z); what is computed with is S (q - Z).

Paper: replace: authors, year, arXiv number. Cost: O(out * in). Limits: errors of a row's weights are not balanced.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field

from lilliput.formats.integer import from_target
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress


class Options(Strict):
    """replace: your options, each with a default and a description."""

    narrow: float = Field(1.0, gt=0.0, le=1.0, description="factor on the range that min-max found")


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes for what the layer's parts leave over, on its support. Raises PlanError without bits in the target."""
    weight = layer.rest()
    if layer.support is not None:
        weight = torch.where(layer.support, weight, 0.0)
    # replace: from here on
    grid_format = from_target(target)
    grid = grid_format.fit(weight)
    grid = replace(grid, scale=(grid.scale.float() * o.narrow).to(grid.scale.dtype))
    return layer.with_part(QuantizedPart(grid_format, grid_format.encode(weight, grid), grid))


METHOD = Compress(
    paper="replace: authors, year, arXiv number",
    options=Options,
    needs=(),  # replace: the statistics you read, of lilliput.stats.fold.NAMES
    writes="quantized",  # replace: "support" where you only choose zeros
    baseline=None,  # replace: the method that yours must beat on correlated inputs
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    run=compress,
    rowwise=True,  # replace: False where output rows depend on each other
)
