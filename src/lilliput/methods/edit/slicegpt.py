"""SliceGPT: a narrower residual stream; the directions of least energy are cut off.

After `principal` has turned the residual stream to its principal directions, largest first, its last channels leave:
columns of the linears that read it, rows of those that write it, entries of the embedding and the head. What stays is
a stock model with a smaller hidden size; norms are scaled by sqrt(before / after), because their mean squares are then
over fewer channels that hold nearly all the energy. A ratio of 0 keeps the function.

The paper has one basis for the inputs of each half of a block and multiplies the skip connections by QT Q' between
them, which no stock config holds; one basis for all is what stays when these are left out, and costs quality.

Paper: Ashkboos et al. 2024, arXiv 2401.15024.
Cost: none beside `principal`. Limits: RMS norms without post-norms only; a tied head is untied, so that small models
with large vocabularies may grow; the width that stays is a multiple of `multiple` and of the number of query heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from lilliput.errors import PlanError
from lilliput.model.edited import Edit as Decision
from lilliput.target import Strict
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditScores, Sizes, Units


class Options(Strict):
    """See the module's docstring."""

    ratio: float = Field(0.2, ge=0.0, lt=1.0, description="share of the residual stream's channels that leaves")
    multiple: int = Field(8, ge=1, description="the channels that stay are a multiple of this")


def sizes(units: Sequence[Units], o: Options) -> Sizes:
    """Raises PlanError where no width is left."""
    first = units[0]
    if o.ratio == 0.0:
        return Sizes(len(units), hidden=first.hidden)
    step = math.lcm(o.multiple, first.queries)
    kept = round((1.0 - o.ratio) * first.hidden / step) * step
    if not 0 < kept < first.hidden:
        raise PlanError(
            f"slicegpt: {kept} of {first.hidden} channels would stay at ratio {o.ratio}, in steps of {step} (multiple "
            f"and {first.queries} query heads divide what stays): give another ratio or a smaller multiple"
        )
    return Sizes(len(units), hidden=kept)


def run(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Options) -> Decision:
    """The first channels."""
    return Decision(tuple(range(len(units))), hidden=sizes.hidden)


METHOD = Edit(
    paper="Ashkboos et al. 2024, arXiv 2401.15024",
    options=Options,
    needs=(),
    covers={
        "slicegpt": [{"method": "principal"}, {"method": "slicegpt"}],
    },
    sizes=sizes,
    run=run,
    turned=True,
)
