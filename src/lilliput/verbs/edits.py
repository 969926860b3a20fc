"""What an edit of the model's structure sees and returns: what there is in each block, how much of it stays, scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.anatomy.model import Anatomy, Block
from lilliput.errors import LilliputError, PlanError
from lilliput.model.edit import Edit, experts_of, heads_of
from lilliput.stats.routing import Routing
from lilliput.stats.site import SiteStats
from lilliput.target import Strict
from lilliput.verbs.timing import Times


@dataclass(frozen=True)
class Units:
    """What can leave a block. channels: the width of each of its MLPs; heads: heads with their query group;
    channel_cost, head_cost: weights of one of each; weights: of all its linears; hidden, queries: width of the residual
    stream, and query heads, which have to divide it; experts, top_k: experts, and how many of them each token uses."""

    channels: tuple[int, ...]
    heads: int
    channel_cost: int
    head_cost: int
    weights: int
    hidden: int = 0
    queries: int = 1
    experts: int = 0
    top_k: int = 0


@dataclass(frozen=True)
class Sizes:
    """What stays: so many blocks, in each of them hidden channels of every MLP, heads and experts, channels of the
    residual stream, and experts that each token uses (None: all, or as many as before). spread: these are means over
    the blocks; as many weights stay in all, and in each block a multiple of `multiple` hidden channels. times: what
    blocks take at other widths, for a decision that asked for them."""

    blocks: int
    channels: int | None = None
    heads: int | None = None
    hidden: int | None = None
    spread: bool = False
    multiple: int = 1
    experts: int | None = None
    top_k: int | None = None
    times: Times | None = None


@dataclass(frozen=True)
class EditView:
    """A block of the model to be edited. `weight(linear)`: float32 [out, in], read anew each time."""

    anatomy: Block
    weight: Callable[[str], Tensor]


@dataclass(frozen=True)
class EditIO:
    """What a score may look at beside the weights; empty or None where its spec does not ask for it.

    stats: by site. gradients, squares: by linear, float32 [out, in], of the mean cross-entropy over all samples: its
    gradient, and the mean over samples of the squared gradient of each one's loss. similarity: the mean over tokens of
    the cosine between what enters the block and what leaves it. gates: under the keys of `EditScores`, float64
    [samples, units], the derivative of each sample's mean cross-entropy by a number 1 that multiplies what the unit
    hands on. outputs: by linear, float32 [out, out], the mean over tokens of g gT, g the gradient by what it gives.
    routing: how the block's router used its experts. sizes: what will stay, of the whole model.
    branches: by branch ("attention", "mlp"), see `streaming.branches.added`.
    """

    stats: Mapping[str, SiteStats]
    gradients: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]
    similarity: float | None = None
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    routing: Routing | None = None
    sizes: Sizes | None = None
    branches: Mapping[str, float] = field(default_factory=dict)


EditScores = Mapping[str, tuple[float, ...]]
"""Of one block: under "block" one number, under "heads" one for each head, under "experts" one for each expert,
under "experts.alike" one for each pair of them, row by row, under "gates" one for each place in a token's choice of
experts, under "channels.N" one for each hidden channel of its MLP number N, under "attention" and "mlp"
one number. They go through the journal."""

SkipLoss = Callable[[Collection[int]], float]
"""Mean cross-entropy in nats of the model without some of its blocks, by number."""


def units_of(anatomy: Anatomy, hidden: int, queries: int) -> tuple[Units, ...]:
    """What there is to leave out, by block; hidden, queries: see `Units`."""
    kinds: dict[int, Units] = {}
    for block in anatomy.blocks:
        if id(block) not in kinds:
            kinds[id(block)] = _units(block, hidden, queries)
    return tuple(kinds[id(block)] for block in anatomy.blocks)


def _units(block: Block, hidden: int, queries: int) -> Units:
    heads, mlps = heads_of(block), block.groups.channels
    head_cost = sum(span_weights(block, x.members) for x in heads[:1])
    channel_cost = sum(span_weights(block, x.group(0).members) for x in mlps[:1])
    weights = sum(x.parameters for x in block.linears)
    widths, experts = tuple(x.width for x in mlps), len(experts_of(block))
    return Units(widths, len(heads), channel_cost, head_cost, weights, hidden, queries, experts, block.chosen)


def span_weights(block: Block, members: Sequence[tuple[str, str, tuple[int, int]]]) -> int:
    """Weights of some rows and columns of a block's linears."""
    total = 0
    for name, axis, (a, b) in members:
        linear = block.linear(name)
        total += (b - a) * (linear.in_features if axis == "rows" else linear.out_features)
    return total


def stay(units: Sequence[Units], leaving: int, protected: Collection[int]) -> int:
    """How many blocks stay. Raises PlanError where that would be none, or a protected block does not exist or would
    have to leave."""
    count = len(units)
    wrong = [n for n in protected if not 0 <= n < count]
    if wrong:
        raise PlanError(f"block {wrong[0]} cannot be protected: the model has blocks 0 to {count - 1}")
    most = min(count - 1, count - len(set(protected)))
    if leaving > most:
        raise PlanError(f"{leaving} of {count} blocks cannot leave: at most {most} can, with {len(set(protected))} "
                        "protected and one that has to stay")  # fmt: skip
    return count - leaving


class Thinning(Strict):
    """Options of what takes hidden channels and heads away."""

    ratio: float = Field(0.2, ge=0.0, lt=1.0, description="share of the blocks' weights that leaves")
    kinds: tuple[Literal["channel", "head"], ...] = Field(
        ("channel",), description="what may leave: channel, head or both"
    )
    multiple: int = Field(8, ge=1, description="hidden channels that stay are a multiple of this")
    uniform: bool = Field(
        True, description="as many stay in every block, as engines need it; false: where scores say, at as many weights"
    )


def heads_left(heads: int, ratio: float, *, alone: bool) -> int:
    """Heads of a block that stay where a share of them leaves, rounded down: at least one. alone: no channels make up
    for the rest of the share, so that one of several leaves at least."""
    least = 1 if alone and ratio > 0.0 else 0
    return heads - min(max(int(ratio * heads + 1e-9), least), heads - 1)


def thinned(units: Sequence[Units], o: Thinning) -> Sizes:
    """What stays by these options. Raises PlanError for a ratio that the kinds do not hold."""
    sizes = thinner(units, o.ratio, o.multiple, o.kinds)
    if o.uniform:
        return sizes
    if any(len(x.channels) > 1 for x in units):
        raise PlanError("the experts of a block are one tensor in engines and keep one width: leave uniform at true")
    return replace(sizes, spread=True, multiple=o.multiple)


def thinner(units: Sequence[Units], ratio: float, multiple: int, kinds: Sequence[str]) -> Sizes:
    """Alike for all blocks: what stays where `ratio` of their weights leaves.

    Heads leave first, as many as the ratio holds of them, rounded down, each with its query group; hidden channels make
    up the rest, so that a multiple of `multiple` stays. Where heads alone leave, one does at least.
    Raises PlanError where that cannot be.
    """
    if len({(x.channels, x.heads) for x in units}) > 1:
        raise PlanError("blocks have different numbers of heads or hidden channels: nothing can be the same in all")
    first, total = units[0], sum(x.weights for x in units)
    wanted = ratio * total / len(units)
    heads = first.heads
    if "head" in kinds and first.heads:
        heads = heads_left(first.heads, ratio, alone="channel" not in kinds)
        wanted -= (first.heads - heads) * first.head_cost
    elif "head" in kinds and "channel" not in kinds:
        raise PlanError("the heads of this model could not be told apart: leave `head` out of kinds")
    if "channel" not in kinds:
        if ratio > 0.0 and heads == first.heads:
            raise PlanError(
                "all query heads of a block share one key-value head, and would leave with it: choose kinds [channel]"
            )
        return Sizes(len(units), None, heads)
    if not first.channels or len(set(first.channels)) > 1:
        raise PlanError("the hidden channels of this model could not be told apart: leave `channel` out of kinds")
    width, mlps = first.channels[0], len(first.channels)
    kept = width - max(0.0, wanted) / (first.channel_cost * mlps)
    kept = int(kept / multiple + 0.5) * multiple if width % multiple == 0 or kept < width else width
    kept = min(kept, width)
    if kept < 1:
        raise PlanError(
            f"ratio {ratio} of the weights is more than the hidden channels hold: give less, or kinds [head, channel]"
        )
    return Sizes(len(units), kept, heads if "head" in kinds else None)


class Fewer(Strict):
    """Options of what leaves fewer experts, as many in every block."""

    ratio: float = Field(0.25, ge=0.0, lt=1.0, description="share of each block's experts that leaves")
    experts: int | None = Field(None, ge=1, description="experts of each block that stay, in place of ratio")


def fewer(units: Sequence[Units], o: Fewer) -> Sizes:
    """What stays by these options. Raises PlanError for a model without experts, or with fewer than are to stay."""
    count = experts_in(units)
    kept = max(1, round((1.0 - o.ratio) * count)) if o.experts is None else o.experts
    if kept > count:
        raise PlanError(f"{kept} experts cannot stay in each block: there are {count}; give a smaller number")
    return Sizes(len(units), experts=kept)


def experts_in(units: Sequence[Units]) -> int:
    """How many experts each block has that has any. Raises PlanError where none has, or blocks differ."""
    found = {x.experts for x in units if x.experts}
    if not found:
        raise PlanError(
            "this model has no experts that a router was seen to choose among: leave the step out, or take `flap` or "
            "`drop-layers`, which need none"
        )
    if len(found) > 1:
        raise PlanError(f"blocks have {min(found)} to {max(found)} experts: nothing can be the same in all")
    return found.pop()


def first_of(units: Sequence[Units], sizes: Sizes) -> Edit:
    """An edit of these sizes before anything is scored: the first of everything stays."""
    return _chosen(units, sizes, lambda block, key, count: tuple(range(count)))


def _chosen(units: Sequence[Units], sizes: Sizes, pick: Callable[[int, str, int], tuple[int, ...]]) -> Edit:
    """The edit of these sizes in which `pick(block, key, count)` stays of what has that key in `EditScores`."""
    channels: dict[tuple[int, int], tuple[int, ...]] = {}
    heads: dict[int, tuple[int, ...]] = {}
    experts: dict[int, tuple[int, ...]] = {}
    for n in range(sizes.blocks):
        if sizes.channels is not None:
            for m in range(len(units[n].channels)):
                channels[n, m] = pick(n, f"channels.{m}", sizes.channels)
        if sizes.heads is not None:
            heads[n] = pick(n, "heads", sizes.heads)
        if sizes.experts is not None and units[n].experts:
            experts[n] = pick(n, "experts", sizes.experts)
    blocks = tuple(range(sizes.blocks))
    return Edit(blocks, channels, heads, sizes.hidden, sizes.spread, experts, top_k=sizes.top_k)


def highest(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The places of the `count` highest scores, ascending; among equals the earlier. Raises LilliputError for NaN."""
    values = torch.tensor(scores, dtype=torch.float64)
    if bool(torch.isnan(values).any()):
        raise LilliputError("scores of an edit contain NaN: check the weights and the calibration data")
    order = torch.sort(values, descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))


def best_units(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes) -> Edit:
    """The heads, experts and hidden channels of the highest scores stay: in every block as many, or with `sizes.spread`
    those that are worth most for their weights in the whole model."""
    if sizes.spread:
        return spread_units(scores, units, sizes)
    return _chosen(units, sizes, lambda block, key, count: highest(scores[block][key], count))


def keep_best(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Any) -> Edit:
    """`best_units`, whatever the options: the decision of a method that has said all in its scores."""
    return best_units(scores, units, sizes)


def spread_units(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, per_weight: bool = True) -> Edit:
    """The units of the lowest scores of the whole model leave until as many weights are left as `sizes` means, and the
    hidden channels of each block are rounded to a multiple, those of all blocks together staying as many.

    `per_weight`: scores are divided by the weights of a unit first, as losses are. One head and one multiple of
    channels stay in every block.
    """
    value, cost, block, head = _ranked(scores, units, sizes, per_weight)
    staying = sum(_weights_left(x, sizes) for x in units)
    order = torch.sort(value, stable=True).indices
    stays = torch.ones(len(value), dtype=torch.bool)
    stays[order[cost[order].cumsum(0) <= float(cost.sum()) - staying + 0.5]] = False
    heads: dict[int, tuple[int, ...]] = {}
    if sizes.heads is not None:
        for n, count in enumerate(block[head & stays].bincount(minlength=len(units)).clamp(min=1).tolist()):
            heads[n] = highest(scores[n]["heads"], count)
    channels: dict[tuple[int, int], tuple[int, ...]] = {}
    if sizes.channels is not None:
        left = staying - sum(len(kept) * units[n].head_cost for n, kept in heads.items())
        widths = block[~head & stays].bincount(minlength=len(units))
        for n, width in enumerate(_rounded(widths, units, sizes, left)):
            channels[n, 0] = highest(scores[n]["channels.0"], width)
    return Edit(tuple(range(sizes.blocks)), channels, heads, spread=True)


def _ranked(
    scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, per_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every unit that may leave: its score, float64, its weights, its block, and whether it is a head."""
    value: list[float] = []
    rest: list[tuple[float, int, bool]] = []
    for n, x in enumerate(units):
        kinds = [("heads", x.head_cost)] if sizes.heads is not None else []
        kinds += [("channels.0", x.channel_cost)] if sizes.channels is not None else []
        for key, cost in kinds:
            value += [y / cost if per_weight else y for y in scores[n][key]]
            rest += [(float(cost), n, key == "heads")] * len(scores[n][key])
    if any(math.isnan(x) for x in value):
        raise LilliputError("scores of an edit contain NaN: check the weights and the calibration data")
    weights, block, head = zip(*rest, strict=True)
    return torch.tensor(value, dtype=torch.float64), torch.tensor(weights), torch.tensor(block), torch.tensor(head)


def _weights_left(units: Units, sizes: Sizes) -> int:
    """Weights of what may leave that stay in a block where all blocks keep as many."""
    return (sizes.channels or 0) * units.channel_cost + (sizes.heads or 0) * units.head_cost


def _rounded(widths: Tensor, units: Sequence[Units], sizes: Sizes, weights: float) -> list[int]:
    """Widths [blocks] as multiples, at least one and at most all, that come to `weights` as nearly as multiples can."""
    step = sizes.multiple
    most = [x.channels[0] // step for x in units]
    steps = [min(max(1, int(w) // step), m) for w, m in zip(widths.tolist(), most, strict=True)]
    wanted = round(weights / (units[0].channel_cost * step))
    while (missing := wanted - sum(steps)) != 0:
        sign = 1 if missing > 0 else -1
        free = [n for n, s in enumerate(steps) if (s < most[n] if sign > 0 else s > 1)]
        if not free:
            break
        free.sort(key=lambda n: (-sign * (float(widths[n]) - steps[n] * step), n))
        for n in free[: abs(missing)]:
            steps[n] += sign
    return [x.channels[0] if s == m else s * step for s, m, x in zip(steps, most, units, strict=True)]


def readers_of(block: Block) -> dict[str, dict[str, Tensor]]:
    """Under the keys of `EditScores`, by linear that reads units: the unit whose output each column reads, int64 [in],
    -1 for none."""
    found: dict[str, dict[str, Tensor]] = {}
    for n, group in enumerate(heads_of(block)):
        for name, axis, (a, b) in group.members:
            if axis == "columns":
                owners = found.setdefault("heads", {})
                owners.setdefault(name, torch.full((block.linear(name).in_features,), -1))[a:b] = n
    for m, mlp in enumerate(block.groups.channels):
        owners = found.setdefault(f"channels.{m}", {})
        for name in mlp.readers:
            owners[name] = torch.full((block.linear(name).in_features,), -1)
            owners[name][: mlp.width] = torch.arange(mlp.width)
    return found


def linears_of(block: Block) -> set[str]:
    """The linears that lose rows or columns with a head or hidden channel."""
    names = {name for group in heads_of(block) for name, _, _ in group.members}
    for mlp in block.groups.channels:
        names |= {name for name, _ in mlp.rows} | set(mlp.readers)
    return names


def by_reader(block: Block, values: Callable[[str], Tensor]) -> EditScores:
    """Scores of all heads and channels: the sum over the columns that read them of values(linear), float [in]."""
    return {key: tuple(added(owners, values).tolist()) for key, owners in readers_of(block).items()}


def added(owners: Mapping[str, Tensor], values: Callable[[str], Tensor]) -> Tensor:
    """Values of columns summed over those of each unit, float64 [units]; owners: see `readers_of`."""
    total = torch.zeros(1 + max(int(x.max()) for x in owners.values()), dtype=torch.float64)
    for name, owner in owners.items():
        owned = owner >= 0
        total.index_add_(0, owner[owned], values(name).double().cpu()[owned])
    return total


def by_member(view: EditView, weight_score: Callable[[str, str, slice | Tensor], Tensor]) -> EditScores:
    """Scores of all heads and channels of a block, summed over their members.

    `weight_score(linear, axis, index)`: a vector with one number for each row or column of the linear.
    """
    block = view.anatomy
    scores: dict[str, tuple[float, ...]] = {}
    heads = []
    for group in heads_of(block):
        heads.append(sum(float(weight_score(n, axis, slice(a, b)).sum()) for n, axis, (a, b) in group.members))
    if heads:
        scores["heads"] = tuple(heads)
    for m, mlp in enumerate(block.groups.channels):
        total = torch.zeros(mlp.width, dtype=torch.float64)
        for name, index in mlp.rows:
            total += weight_score(name, "rows", index).double().cpu()
        for name in mlp.readers:
            total += weight_score(name, "columns", slice(0, mlp.width)).double().cpu()
        scores[f"channels.{m}"] = tuple(total.tolist())
    return scores
