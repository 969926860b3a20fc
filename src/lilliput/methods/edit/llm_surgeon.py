"""LLM Surgeon: heads and hidden channels leave by the curvature of the loss, as a product of inputs and gradients.

The Fisher information of a linear W [out, in] is taken for G (x) A, with A = XT X / N of its inputs and G = gT g / N of
the gradients that arrive at its outputs, over N tokens. What it costs to lose a row or a column, when the weights that
stay make up for it as well as they can (optimal brain surgeon), is

    row i: w_i A w_iT / (2 [G^-1]_ii),    column j: w_jT G w_j / (2 [A^-1]_jj).

A unit's score is the sum over the rows and columns that leave with it. G and A are damped by a share of their mean
diagonal before they are inverted. For all rows R or columns R that leave, K being those that stay, the change is

    rows: W_K + (G_KK)^-1 G_KR W_R,    columns: W_K + W_R A_RK (A_KK)^-1.

With `shots` the units that are to leave do so in as many rounds of equal size: after each the weights that stay are
changed so, and costs are taken anew of what is left, with A and G of the whole model. `update` writes the change.

Paper: van der Ouderaa et al. 2024, arXiv 2312.17244. Its shots take the curvature anew as well, of the model that the
one before has left: that is this step several times in a recipe, each with a part of the ratio and `update`, at two
backward passes each. `refit` after this step solves columns for the inputs that have been changed, too.
Cost: one backward pass of `samples` samples for each step of the kind, and another for `update`, when it is known what
stays; with a matrix [in, in] for each site and one [out, out] for each linear, which are factored: (in^3 + out^3) / 3
for each shot. Limits: biases stay as they are; the paper's low-rank correction between shots is left out; its one
threshold for all layers is `uniform: false`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra.obs import factorize, inverse_diagonal, regularized
from lilliput.algebra.removal import made_up
from lilliput.anatomy.model import Block
from lilliput.model.edit import heads_of
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Thinning, by_member, thinned
from lilliput.verbs.sampled import always, looked_at

Stays = Mapping[str, Collection[int]]
"""Under the keys of `EditScores`, the units that stay."""


class Options(Thinning):
    """See the module's docstring."""

    damping: float = Field(0.01, gt=0.0, description="added to the diagonals, as a share of their mean")
    samples: int = Field(32, ge=1, description="calibration samples whose gradients are taken, at most")
    shots: int = Field(1, ge=1, description="rounds in which units leave; costs are taken anew in each")
    update: bool = Field(
        False, description="change the weights that stay, at the price of another backward pass (see the equations)"
    )


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """The cost of every head and channel; of those that leave in an earlier shot it is lower than of all after."""
    costs = _costs(view, io, {}, o)
    if o.shots == 1 or io.sizes is None:
        return costs
    left = {key: io.sizes.heads if key == "heads" else io.sizes.channels for key in costs}
    leaving = {key: 0 if count is None else len(costs[key]) - count for key, count in left.items()}
    gone: dict[str, list[tuple[int, float]]] = {key: [] for key in costs}
    for shot in range(1, o.shots + 1):
        for key, values in costs.items():
            out = {n for n, _ in gone[key]}
            order = sorted((n for n in range(len(values)) if n not in out), key=lambda n: values[n])
            count = len(order) if shot == o.shots else leaving[key] * shot // o.shots - len(out)
            gone[key] += [(n, values[n]) for n in order[:count]]
        if shot < o.shots:
            stays = {key: set(range(len(x))) - {n for n, _ in gone[key]} for key, x in costs.items()}
            costs = _costs(view, io, stays, o)
    return {key: _rising(order) for key, order in gone.items()}


def _rising(order: list[tuple[int, float]]) -> tuple[float, ...]:
    """Scores by unit from units in the order in which they leave, with their costs: each above the one before."""
    scores, least = [0.0] * len(order), -math.inf
    for n, value in order:
        scores[n] = least = value if math.isnan(value) else max(value, least)
        least = math.nextafter(least, math.inf)
    return tuple(scores)


def _costs(view: EditView, io: EditIO, stays: Stays, o: Options) -> EditScores:
    """The cost of every unit that stays while the others have left and been made up for; 0 of the others."""
    kept = _kept(view.anatomy, stays)
    costs: dict[tuple[str, str], Tensor] = {}
    inverses: dict[tuple[str, str], Tensor] = {}

    def inverse(name: str, axis: str, matrix: Tensor) -> Tensor:
        here = kept.get((name, axis))
        site = view.anatomy.linear(name).site
        key = (axis, name if axis == "rows" or here is not None else site)
        if key not in inverses:
            if here is None:
                inverses[key] = inverse_diagonal(factorize(matrix, o.damping)).double()
            else:
                inverses[key] = torch.ones(len(matrix), dtype=torch.float64, device=matrix.device)
                part = regularized(matrix, o.damping, 0.0)[here][:, here]
                inverses[key][here] = inverse_diagonal(factorize(part, 0.0)).double()
        return inverses[key]

    def of(name: str, axis: str, index: slice | Tensor) -> Tensor:
        if (name, axis) not in costs:
            inputs, slopes = _curvature(view, io, name)
            weight = view.weight(name)
            for side in ("rows", "columns"):
                if (here := kept.get((name, side))) is not None:
                    turned = torch.zeros_like(_turned(weight, side))
                    turned[:, here] = _made_up(weight, side, here, slopes if side == "rows" else inputs, o)
                    weight = _turned(turned, side)
            if axis == "rows":
                costs[name, axis] = cost(weight.T, inputs, slopes, inverse(name, axis, slopes))
            else:
                costs[name, axis] = cost(weight, slopes, inputs, inverse(name, axis, inputs))
        return costs[name, axis][index]

    return by_member(view, of)


def cost(weight: Tensor, across: Tensor, along: Tensor, inverse: Tensor) -> Tensor:
    """w_jT across w_j / (2 inverse_j) for the columns of a weight [n, m], float64 [m].

    across [n, n]; inverse [m]: the diagonal of the inverse of along [m, m]. All 0 where nothing was seen of `along`.
    """
    if not bool(along.diagonal().any()):
        return torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    energy = (across @ weight).mul_(weight).sum(0, dtype=torch.float64)
    return 0.5 * energy / inverse


def update(view: EditView, io: EditIO, stays: Mapping[str, tuple[int, ...]], o: Options) -> Mapping[str, Tensor]:
    """The linears that lose rows or columns, with those that stay changed to make up for them, float32."""
    kept = _kept(view.anatomy, stays)
    changed: dict[str, Tensor] = {}
    for (name, side), here in sorted(kept.items(), key=lambda x: (x[0][0], x[0][1] != "rows")):
        inputs, slopes = _curvature(view, io, name)
        weight = changed[name] if name in changed else view.weight(name)
        changed[name] = _turned(_made_up(weight, side, here, slopes if side == "rows" else inputs, o), side)
    return changed


def _curvature(view: EditView, io: EditIO, name: str) -> tuple[Tensor, Tensor]:
    """A [in, in] and G [out, out] of a linear."""
    stats = io.stats[view.anatomy.linear(name).site]
    return stats.need("gram") / max(stats.count, 1), io.outputs[name]


def _turned(weight: Tensor, side: str) -> Tensor:
    return weight.T if side == "rows" else weight


def _made_up(weight: Tensor, side: str, here: Tensor, along: Tensor, o: Options) -> Tensor:
    """What stays of rows or columns, as columns, changed to make up for the others."""
    here = here.to(weight.device)
    return made_up(_turned(weight, side), regularized(along, o.damping, 0.0), here)


def _kept(block: Block, stays: Stays) -> dict[tuple[str, str], Tensor]:
    """By linear and side ("rows", "columns") which of them stay, bool; sides that lose none are not there."""
    kept: dict[tuple[str, str], Tensor] = {}

    def lose(name: str, side: str, index: slice | Tensor) -> None:
        linear = block.linear(name)
        length = linear.out_features if side == "rows" else linear.in_features
        kept.setdefault((name, side), torch.ones(length, dtype=torch.bool))[index] = False

    for n, group in enumerate(heads_of(block)):
        if n not in stays.get("heads", range(n + 1)):
            for name, side, (a, b) in group.members:
                lose(name, side, slice(a, b))
    for m, mlp in enumerate(block.groups.channels):
        chosen = stays.get(f"channels.{m}", range(mlp.width))
        out = torch.tensor([n for n in range(mlp.width) if n not in set(chosen)], dtype=torch.int64)
        if len(out):
            for name, index in mlp.rows:
                lose(name, "rows", index[out])
            for name in mlp.readers:
                lose(name, "columns", out)
    return kept


METHOD = Edit(
    paper="van der Ouderaa et al. 2024, arXiv 2312.17244",
    options=Options,
    needs=("gram",),
    covers={
        "llm-surgeon": [
            {"method": "llm-surgeon", "options": {"shots": 5, "update": True}},
            {"method": "refit"},
        ],
    },
    sizes=thinned,
    score=score,
    update=update,
    updates=lambda o: o.update,
    outputs=always,
    looked_at=looked_at,
)
