"""Gates of heads and hidden channels: they leave whose hard-concrete gates are closed when training has ended.

A gate z multiplies what a head, with its query group, or a hidden channel hands on. With u uniform in (0, 1),

    s = sigmoid((log u - log(1 - u) + log alpha) / beta),   z = clip(s (zeta - gamma) + gamma, 0, 1),

beta = 2/3, gamma = -0.1, zeta = 1.1, so that z is exactly 0 or 1 for much of the noise, and the share of gates that are
open is expected to be the mean of P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta)). The loss is the objective's
plus lambda d + phi d^2, d the expected share of the blocks' weights that stay minus what `ratio` leaves, which comes
down from all while targets warm up; multipliers lambda and phi climb. With `penalty` in place of targets the loss is
that plus `penalty` times the mean of P(z > 0). `relax: plain` trains z itself between 0 and 1: L1 on gates.

As many stay as `ratio` says, those likeliest open, and what their gates have come to is multiplied into the weights
that read them. The linears stay as they are meanwhile, or are trained too, whole or by adapters (`weights`).

Papers: Louizos et al. 2018, arXiv 1712.01312; of heads: Voita et al. 2019, arXiv 1905.09418; of heads and hidden
channels: McCarley et al. 2019, arXiv 1910.06360; with adapters alone: Rücklé et al. 2021, arXiv 2010.11918 and
pruning-adapter. Cost: the whole model in memory, forward and back, for every step. Limits: blocks alike; a step trains
on a few samples, so gates need hundreds of steps to part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import Sizes, Thinning, Units, thinned
from lilliput.verbs.gated import GateOptions, Training, most_open, share_shape, training, unit_counts


class Options(Thinning, GateOptions):
    """See the module's docstring."""

    kinds: tuple[Literal["channel", "head"], ...] = Field(
        ("channel", "head"), description="what may leave: channel, head or both"
    )
    relax: Literal["hard-concrete", "plain"] = Field("hard-concrete", description="plain: z is trained itself")
    penalty: float | None = Field(None, gt=0.0, description="weight of the mean of P(z > 0), in place of targets")


def trained(units: Sequence[Units], sizes: Sizes, o: Options) -> Training:
    """Gates of the units that may leave. Raises PlanError where there are none."""
    shape = share_shape(units, sizes, o.kinds) if o.penalty is None else None
    return training(unit_counts(units, o.kinds), units, shape, o, o.relax, o.penalty or 0.0)


METHOD = Edit(
    paper="Louizos et al. 2018, arXiv 1712.01312",
    options=Options,
    needs=(),
    covers={
        "hard-concrete": [{"method": "hard-concrete"}],
        "voita-heads": [{"method": "hard-concrete", "options": {"kinds": ["head"], "penalty": 1.0}}],
        "mccarley": [{"method": "hard-concrete", "options": {"penalty": 1.0}}, {"method": "full"}],
        "pruning-adapter": [{"method": "hard-concrete", "options": {"kinds": ["head"], "weights": "adapters"}}],
        "simple-l1": [
            {"method": "hard-concrete", "options": {"relax": "plain", "penalty": 1.0}},
            {"method": "full", "options": {"objective": "logit-kd"}},
        ],
    },
    sizes=thinned,
    run=most_open,
    trained=trained,
)
