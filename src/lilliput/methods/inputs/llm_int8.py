"""LLM.int8(): inputs as 8-bit integers by token, but for channels with outliers, which stay in floating point.

In each forward pass O = {j: max_t |X_tj| >= alpha}. Of y = sum_{j in O} X_tj W_oj + sum_{j not in O} X_tj W_oj the
first sum has the inputs as they are, the second integers: s_t = max_{j not in O} |X_tj| / (2^b - 1) * 2 for each token
t (the paper: max / 127; this is the definition of all integer inputs here), q_tj = round(X_tj / s_t). With alpha = 0
nothing is rounded, with a large one everything is, as by `act-static-dynamic`.

The weights are those of the step before: with one scale for each output row and 8 bits they are the paper's c_w,
and the columns of O are multiplied as decoded from 8 bits (the paper keeps 16 bits of all of them in memory, of which
it reads those of O).

Paper: Dettmers et al. 2022, arXiv 2208.07339.
Cost: no calibration. Limits: O depends on all tokens of a forward pass, so a token's result depends on what is batched
with it, and on how a text is cut into passes. Products over a set of columns that changes run slower than plain ones on
small models. `lilliput inspect MODEL --data docs` says which channels those are.
"""

from __future__ import annotations

from pydantic import Field

from lilliput.parts.inputs.grid import InputGrid, InputSpec
from lilliput.parts.inputs.mixed import MixedInput
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.inputs import Inputs


class Options(Strict):
    """`alpha` 0: every channel stays as it is."""

    alpha: float = Field(6.0, ge=0.0, le=1e30, description="size from which on an input is an outlier")


def spec(target: Target, o: Options, width: int) -> InputSpec:
    """The grid. Raises PlanError for what cannot be."""
    return MixedInput(target.bits or 8, o.alpha)


def inputs(layer: Layer, stats: SiteStats, target: Target, o: Options) -> InputGrid:
    """The grid of a layer's inputs, which stores nothing."""
    return InputGrid(spec(target, o, stats.width))


METHOD = Inputs(
    paper="Dettmers et al. 2022, arXiv 2208.07339",
    options=Options,
    needs=(),
    formats=("int",),
    covers={
        "llm-int8": [
            {"method": "rtn", "target": {"bits": 8, "group_size": "channel"}, "options": {"search": "minmax"}},
            {"method": "llm-int8"},
        ],
    },
    run=inputs,
    spec=spec,
)
