"""replace: one line that says how my-method predicts errors. Now: by the error of the weights alone.

replace: the equations. Rounding W [out, in] to nearest leaves D; the error is sum_i v_i |D_i|^2 for weights v of the
output rows.

Paper: replace: authors, year, arXiv number. Cost: one rounding for each grid. Limits: sees nothing of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from lilliput.budget import menu
from lilliput.formats import ranged
from lilliput.formats.known import from_target
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.choose import Choose, Goal, Trials


class Options(Strict):
    """replace: your options, each with a default and a description."""

    entries: tuple[str, ...] = Field(("integers",), description="the menu: a name, or grids such as int3/64/asym")
    size: int | None = Field(None, ge=1, description="the most bytes of the written folder")
    average: float | None = Field(None, gt=0, description="stored bits of a weight on average, scales included")


def score(
    weight: Tensor, stats: SiteStats, targets: Sequence[Target], rows: Tensor | None, o: Options
) -> tuple[float, ...]:
    """For each target, the error that it leaves, rows weighed by `rows` [out]; 0 where no token reached the linear."""
    if not stats.count:
        return (0.0,) * len(targets)
    # replace: from here on
    errors = []
    for target in targets:
        form = from_target(target)
        grid = ranged.fit(form, weight, None, ranged.RangeRule("mse"))
        each = (form.decode(form.encode(weight, grid), grid) - weight).double().square().sum(1)
        errors.append(float(each.sum() if rows is None else rows.double() @ each))
    return tuple(errors)


METHOD = Choose(
    paper="replace: authors, year, arXiv number",
    options=Options,
    needs=("gram",),
    # replace: a step after it that applies the choice
    recipe=[
        {"method": "my-method", "options": {"average": 4.0}},
        {"method": "gptq", "target": {"bits": 2, "group_size": 64}},
    ],
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    score=score,
    entries=lambda o: menu.entries(o.entries),
    goal=lambda o: Goal(o.size, o.average),
    trials=lambda o: Trials(None, 1.0, (0.5, 1.0)),
    fused=lambda o: False,
    governs=("gptq", "rtn"),
)
