"""Compresso: gates of heads and hidden channels, trained with adapters while the model's own weights stay.

Beside every linear W of a block stands an adapter, W + B A, of `adapter_width` channels; gates are hard concrete, and
held by multipliers to the share of the weights that `ratio` leaves (`hard-concrete`). Only adapters and gates are
trained, so that a model can be narrowed on instructions (`data`) with the memory of a forward and a backward pass. At
the end B A and the gates are multiplied out, and the model is sliced: it computes what the gated one did, with gates at
what they settle at.

Paper: Guo et al. 2023, arXiv 2310.05015. There residual channels have gates too (`sheared-llama` with `weights:
adapters`), and a prompt tells the model that it is being pruned: write it into the text to train on, and in front of
whatever the model reads later. Cost: forward and back through the whole model for every step; of the linears' weights
no gradients. Limits: as `hard-concrete`.
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
    weights: Literal["frozen", "trained", "adapters"] = Field(
        "adapters", description="the blocks' linears meanwhile: as they are, trained whole, or with low-rank adapters"
    )


def trained(units: Sequence[Units], sizes: Sizes, o: Options) -> Training:
    """Gates of the units. Raises PlanError where there are none."""
    return training(unit_counts(units, o.kinds), units, share_shape(units, sizes, o.kinds), o)


METHOD = Edit(
    paper="Guo et al. 2023, arXiv 2310.05015",
    options=Options,
    needs=(),
    covers={"compresso": [{"method": "compresso"}]},
    sizes=thinned,
    run=most_open,
    trained=trained,
)
