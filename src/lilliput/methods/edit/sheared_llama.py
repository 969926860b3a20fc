"""Sheared LLaMA: gates for blocks, heads, hidden channels and channels of the residual stream, held to a target shape.

Every block has a gate, and so has every channel of the residual stream, the same for the whole model; in each block
every head with its query group and every hidden channel has one. The loss is the objective's (by default the text's
cross-entropy), and for every structure that the shape narrows

    lambda d + phi d^2,   d = (sum P(z > 0) - T) / n,

T of n being asked for: of blocks and residual channels in all, of heads and hidden channels in each block, so that the
shape is that of a model which engines know. Gates are hard concrete (`hard-concrete`); weights and gates go down,
multipliers up; T comes down from n while `warm` says. Then the T likeliest gates of each structure stay, the values of
those of heads, hidden channels and blocks are multiplied into the weights (gates of the residual stream are taken for
open), the model is sliced, and training goes on with a step `full`.

Paper: Xia et al. 2024, arXiv 2310.06694. Cost: the whole model in memory, forward and back, for every step; with
`weights: trained` four copies of the weights. Limits: a narrower residual stream needs plain RMS norms, and a tied head
is untied for it; the paper's gates take 3200 steps of 32 x 4096 tokens, and what follows 50 billion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lilliput.errors import PlanError
from lilliput.model.edit import Edit as Decision
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditScores, Sizes, Units, highest, stay
from lilliput.verbs.gated import GateOptions, Shape, Training, training

_SHAPES = {
    "sheared-1.3b": {"layers": 24, "heads": 16, "channels": 5504, "hidden": 2048},
    "sheared-2.7b": {"layers": 32, "heads": 20, "channels": 6912, "hidden": 2560},
}


class Options(GateOptions):
    """See the module's docstring. What is not named stays as it is."""

    like: Literal["sheared-1.3b", "sheared-2.7b"] | None = Field(None, description="the shape of a known model")
    layers: int | None = Field(None, ge=1, description="blocks that stay")
    heads: int | None = Field(None, ge=1, description="heads of a block that stay, each with its query group")
    channels: int | None = Field(None, ge=1, description="hidden channels of a block's MLP that stay")
    hidden: int | None = Field(None, ge=1, description="channels of the residual stream that stay")
    protect: tuple[int, ...] = Field((), description="blocks that stay, by number from 0")
    weights: Literal["frozen", "trained", "adapters"] = Field(
        "trained", description="the blocks' linears meanwhile: as they are, trained whole, or with low-rank adapters"
    )


def _wanted(units: Sequence[Units], o: Options) -> dict[str, int]:
    """What is asked for of each structure that gets narrower. Raises PlanError where there is less of it already."""
    first = units[0]
    there = {"layers": len(units), "heads": first.heads, "channels": (*first.channels, 0)[0], "hidden": first.hidden}
    named = dict(_SHAPES[o.like]) if o.like is not None else {}
    named |= {
        key: value
        for key, value in (("layers", o.layers), ("heads", o.heads), ("channels", o.channels), ("hidden", o.hidden))
        if value is not None
    }
    for key, value in named.items():
        if value > there[key]:
            raise PlanError(f"sheared-llama: {value} {key} cannot stay of {there[key]}: give a smaller number")
    return {key: value for key, value in named.items() if value < there[key]}


def narrows(o: Options) -> bool:
    """Whether the residual stream gets narrower."""
    return o.hidden is not None or o.like is not None


def sizes(units: Sequence[Units], o: Options) -> Sizes:
    """Raises PlanError for a shape that the model does not hold."""
    wanted, first = _wanted(units, o), units[0]
    if "channels" in wanted and len(first.channels) != 1:
        raise PlanError("sheared-llama narrows blocks that have one MLP: leave `channels` out for a model of experts")
    left = len(units) - wanted.get("layers", len(units))
    hidden = wanted.get("hidden")
    if hidden is not None and hidden % first.queries:
        raise PlanError(f"sheared-llama: hidden {hidden} is no multiple of the {first.queries} query heads")
    if narrows(o) and hidden is None:
        hidden = first.hidden
    return Sizes(stay(units, left, o.protect), wanted.get("channels"), wanted.get("heads"), hidden)


def trained(units: Sequence[Units], sizes: Sizes, o: Options) -> Training:
    """Gates of the structures that get narrower, each with its target."""
    first, wanted = units[0], _wanted(units, o)
    counts, targets = {}, {}
    kinds = (("layers", "block", 1), ("heads", "heads", first.heads), ("channels", "channels.0", first.channels[0]))
    for name, kind, count in (*kinds, ("hidden", "hidden", first.hidden)):
        if name in wanted:
            counts[kind], targets[kind] = count, wanted[name]
    if not counts:
        raise PlanError(
            "sheared-llama makes nothing smaller: name layers, heads, channels, hidden, or a shape (`like`)"
        )
    return training(counts, units, Shape(targets), o)


def run(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Options) -> Decision:
    """The likeliest gates of each structure."""
    blocks = tuple(range(len(units)))
    if sizes.blocks < len(units):
        free = [n for n in blocks if n not in o.protect]
        best = highest([scores[n]["block"][0] for n in free], sizes.blocks - len(set(o.protect)))
        blocks = tuple(sorted({*o.protect, *(free[n] for n in best)}))
    channels, heads = {}, {}
    for n in blocks:
        if sizes.channels is not None:
            channels[n, 0] = highest(scores[n]["channels.0"], sizes.channels)
        if sizes.heads is not None:
            heads[n] = highest(scores[n]["heads"], sizes.heads)
    residual = None
    if sizes.hidden is not None:
        kept = scores[0].get("hidden")
        residual = tuple(range(sizes.hidden)) if kept is None else highest(kept, sizes.hidden)
    return Decision(blocks, channels, heads, sizes.hidden, residual=residual)


METHOD = Edit(
    paper="Xia et al. 2024, arXiv 2310.06694",
    options=Options,
    needs=(),
    covers={
        "sheared-llama": [
            {"method": "sheared-llama", "options": {"layers": 1, "steps": 8}},
            {"method": "full", "options": {"objective": "cross-entropy"}},
        ],
    },
    recipe="it needs a shape: name at least one of layers, heads, channels and hidden, or `like`",
    sizes=sizes,
    run=run,
    trained=trained,
    narrows=narrows,
)
