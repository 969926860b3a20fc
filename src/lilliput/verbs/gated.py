"""What an edit asks for whose scores are gates that were trained, and the options that all such edits have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from lilliput.errors import PlanError
from lilliput.model.edit import Edit
from lilliput.verbs.edits import EditScores, Sizes, Units, best_units, spread_units
from lilliput.verbs.train import TrainOptions


class GateOptions(TrainOptions):
    """What every edit can be told that trains gates. Weights and adapters have the learning rate `lr`."""

    objective: str = Field("cross-entropy", description="what is minimised: a method of the verb `objective`")
    schedule: Literal["cosine", "linear", "constant"] = Field("constant", description="how the rates fall")
    gate_lr: float = Field(0.1, gt=0.0, description="learning rate of gates (log alpha) and multipliers")
    warm: float = Field(0.3, ge=0.0, le=1.0, description="share of the steps in which targets come down from all")
    weights: Literal["frozen", "trained", "adapters"] = Field(
        "frozen", description="the blocks' linears meanwhile: as they are, trained whole, or with low-rank adapters"
    )
    adapter_width: int = Field(8, ge=1, description="with adapters: channels between their two factors")


@dataclass(frozen=True)
class Shape:
    """How many gates of each kind stay open. stay: of "hidden" and "block" in all, of other kinds in each block;
    `share`: in place of that, of all weights, the share that stays, in the mean over what may leave. costs: weights of
    one head and one hidden channel; fixed: weights of a block that stay in any case, whatever its gates say."""

    stay: Mapping[str, int] = field(default_factory=dict)
    share: float | None = None
    head_cost: int = 0
    channel_cost: int = 0
    fixed: int = 0


@dataclass(frozen=True)
class Training:
    """How gates are trained. counts: by kind, gates of each block, or of the model for "hidden", and for "block",
    "attention" and "mlp", which are one in each block; "heads" and "channels.N" are as in `EditScores`.

    relax: hard concrete, or "plain": z itself is trained, between 0 and 1. shape: what is held to by multipliers; None:
    `penalty` times the share of gates that are open is added to the loss instead. warm: share of the training in which
    targets go from all to what is wanted. rate: factor on the learning rate, of gates and multipliers. width: channels
    of adapters beside every linear; 0: there are none. weights: the linears themselves are trained.
    """

    counts: Mapping[str, int]
    blocks: int
    shape: Shape | None
    relax: Literal["hard-concrete", "plain"] = "hard-concrete"
    penalty: float = 0.0
    warm: float = 0.3
    rate: float = 1.0
    width: int = 0
    weights: bool = False


def training(
    counts: Mapping[str, int],
    units: Sequence[Units],
    shape: Shape | None,
    o: GateOptions,
    relax: Literal["hard-concrete", "plain"] = "hard-concrete",
    penalty: float = 0.0,
) -> Training:
    """Gates of these kinds, as the options say they are trained. Raises PlanError where there are none."""
    empty = [kind for kind, count in counts.items() if not count]
    if empty or not counts:
        raise PlanError(
            f"the {empty[0] if empty else 'units'} of this model could not be told apart: no gates for them"
        )
    if len({(x.channels, x.heads) for x in units}) > 1:
        raise PlanError("blocks have different numbers of heads or hidden channels: gates need blocks that are alike")
    return Training(
        dict(counts),
        len(units),
        shape,
        relax=relax,
        penalty=penalty,
        warm=o.warm,
        rate=o.gate_lr / o.lr,
        width=o.adapter_width if o.weights == "adapters" else 0,
        weights=o.weights == "trained",
    )


def unit_counts(units: Sequence[Units], kinds: Sequence[str]) -> dict[str, int]:
    """Gates of a block's units by kind, of "head" and "channel"."""
    first = units[0]
    counts = {"heads": first.heads} if "head" in kinds else {}
    if "channel" in kinds:
        counts |= {f"channels.{m}": width for m, width in enumerate(first.channels)} or {"channels.0": 0}
    return counts


def share_shape(units: Sequence[Units], sizes: Sizes, kinds: Sequence[str]) -> Shape:
    """As many weights stay as `sizes` leaves of the heads and hidden channels, wherever they are."""
    first = units[0]
    mlps = len(first.channels)
    fixed = first.weights
    left = 0
    if "head" in kinds:
        fixed -= first.heads * first.head_cost
        left += (first.heads if sizes.heads is None else sizes.heads) * first.head_cost
    if "channel" in kinds and mlps:
        fixed -= sum(first.channels) * first.channel_cost
        width = first.channels[0] if sizes.channels is None else sizes.channels
        left += mlps * width * first.channel_cost
    return Shape(
        share=(fixed + left) / first.weights,
        head_cost=first.head_cost,
        channel_cost=first.channel_cost,
        fixed=fixed,
    )


def most_open(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Any) -> Edit:
    """The heads and hidden channels stay whose gates are likeliest open; over all blocks where sizes may differ."""
    if sizes.spread:
        return spread_units(scores, units, sizes, per_weight=False)
    return best_units(scores, units, sizes)
