"""CoFi: coarse gates of a block's attention and MLP beside the fine ones of its heads and hidden channels.

What a head hands on is multiplied by its gate and by that of its block's attention, and so for hidden channels and the
MLP. The gates are hard concrete (`hard-concrete`), and held to the share of the blocks' weights that `ratio` leaves:

    s = sum over blocks of (c_h P(attention) sum P(head) + c_c P(MLP) sum P(channel)) / all weights,
    L = L_distil + lambda (s - t) + phi (s - t)^2,

P the chance that a gate is open, c the weights of a unit. The model learns from what it was itself (`logit-kd` by
default, weighed with the text), its weights with the gates. Of every unit both gates together say whether it stays:
in each block, or with `uniform: false` over the whole model, as in the paper, so that blocks get widths of their own,
in the native layout; a branch whose coarse gate has closed keeps one head, or `multiple` hidden channels, because no
config leaves a branch out.

Paper: Xia et al. 2022, arXiv 2204.00408. There channels of the residual stream have gates too (here `sheared-llama`),
and layers are matched with the layers of the teacher that they are nearest to (`feature-kd` in a step `full` that
follows). Cost: the whole model in memory with moments, forward and back, for every step. Limits: as `hard-concrete`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import Sizes, Thinning, Units, thinned
from lilliput.verbs.gated import GateOptions, Training, most_open, share_shape, training, unit_counts


class Options(Thinning, GateOptions):
    """See the module's docstring."""

    kinds: tuple[Literal["channel", "head"], ...] = Field(
        ("channel", "head"), description="what may leave: channel, head or both"
    )
    uniform: bool = Field(
        True, description="as many stay in every block, as engines need it; false: where gates say, at as many weights"
    )
    objective: str = Field("logit-kd", description="what is minimised: a method of the verb `objective`")
    objective_options: Mapping[str, Any] = Field(
        default_factory=lambda: {"soft": 0.9}, description="options of the objective"
    )
    weights: Literal["frozen", "trained", "adapters"] = Field(
        "trained", description="the blocks' linears meanwhile: as they are, trained whole, or with low-rank adapters"
    )


def trained(units: Sequence[Units], sizes: Sizes, o: Options) -> Training:
    """Gates of units and of their branches. Raises PlanError where there are none."""
    counts = unit_counts(units, o.kinds)
    counts |= {"attention": 1} if "head" in o.kinds else {}
    counts |= {"mlp": 1} if "channel" in o.kinds else {}
    return training(counts, units, share_shape(units, sizes, o.kinds), o)


METHOD = Edit(
    paper="Xia et al. 2022, arXiv 2204.00408",
    options=Options,
    needs=(),
    covers={"cofi": [{"method": "cofi"}]},
    sizes=thinned,
    run=most_open,
    trained=trained,
)
