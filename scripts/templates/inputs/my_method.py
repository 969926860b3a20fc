"""replace: one line that says what the grid is.

replace: the equation. Here a scale for each token covers a share of its largest input.

Paper: replace: authors, year, arXiv number.
Cost: none. Limits: replace: what it cannot do.
"""

from __future__ import annotations

from pydantic import Field

from lilliput.parts.inputs.grid import InputGrid, InputSpec
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.inputs import Inputs


class Options(Strict):
    """replace: what a user may choose."""

    cover: float = Field(0.95, gt=0.0, le=1.0, description="share of a token's largest input that is covered")


def spec(target: Target, o: Options, width: int) -> InputSpec:
    """The grid, as the plan knows it. replace: a kind of your own is a file in parts/inputs and a line in known.py."""
    return UniformInput(target.bits or 8, symmetric=target.symmetric, clip=o.cover)


def inputs(layer: Layer, stats: SiteStats, target: Target, o: Options) -> InputGrid:
    """The grid with its values. replace: read `stats.need(...)`, and name what you read in `needs`."""
    return InputGrid(spec(target, o, stats.width))


METHOD = Inputs(
    paper="replace: authors, year, arXiv number",
    options=Options,
    needs=(),
    covers={},
    recipe=[{"method": "rtn", "target": {"bits": 8, "group_size": "channel"}}, {"method": "my-method"}],
    run=inputs,
    spec=spec,
)
