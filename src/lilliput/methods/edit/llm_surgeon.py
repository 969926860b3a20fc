"""LLM Surgeon: heads and hidden channels leave by the curvature of the loss, as a product of inputs and gradients.

The Fisher information of a linear W [out, in] is taken for G (x) A, with A = XT X / N of its inputs and G = gT g / N of
the gradients that arrive at its outputs, over N tokens. What it costs to lose a row or a column, when the weights that
stay make up for it as well as they can (optimal brain surgeon), is

    row i: w_i A w_iT / (2 [G^-1]_ii),    column j: w_jT G w_j / (2 [A^-1]_jj).

A unit's score is the sum over the rows and columns that leave with it. G and A are damped by a share of their mean
diagonal before they are inverted.

Paper: van der Ouderaa et al. 2024, arXiv 2312.17244. Its tens of shots, with curvature taken anew after each, are this
step several times in a recipe, each with a part of the ratio. Its update of the columns that stay, -w_j e_jT A^-1 /
[A^-1]_jj and jointly for many, is what `refit` after this step solves.
Cost: one backward pass of `samples` samples for each step of the kind, with a matrix [in, in] for each site and one
[out, out] for each linear, which are factored: (in^3 + out^3) / 3. Limits: rows that stay do not make up for those that
left; the paper's low-rank correction between shots is left out; its one threshold for all layers is `uniform: false`.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra.obs import factorize, inverse_diagonal
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Thinning, by_member, thinned
from lilliput.verbs.sampled import always, looked_at


class Options(Thinning):
    """See the module's docstring."""

    damping: float = Field(0.01, gt=0.0, description="added to the diagonals, as a share of their mean")
    samples: int = Field(32, ge=1, description="calibration samples whose gradients are taken, at most")


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """The cost of every head and channel."""
    costs: dict[tuple[str, str], Tensor] = {}
    inverses: dict[str, Tensor] = {}

    def inverse(key: str, matrix: Tensor) -> Tensor:
        if key not in inverses:
            inverses[key] = inverse_diagonal(factorize(matrix, o.damping)).double()
        return inverses[key]

    def of(name: str, axis: str, index: slice | Tensor) -> Tensor:
        if (name, axis) not in costs:
            site = view.anatomy.linear(name).site
            stats = io.stats[site]
            inputs, slopes = stats.need("gram") / max(stats.count, 1), io.outputs[name]
            if axis == "rows":
                costs[name, axis] = cost(view.weight(name).T, inputs, slopes, inverse(f"outputs of {name}", slopes))
            else:
                costs[name, axis] = cost(view.weight(name), slopes, inputs, inverse(f"inputs of {site}", inputs))
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


METHOD = Edit(
    paper="van der Ouderaa et al. 2024, arXiv 2312.17244",
    options=Options,
    needs=("gram",),
    covers={
        "llm-surgeon": [{"method": "llm-surgeon"}, {"method": "refit"}],
    },
    sizes=thinned,
    score=score,
    outputs=always,
    looked_at=looked_at,
)
