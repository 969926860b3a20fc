"""KPrune: heads and hidden channels leave that hold least of the model's knowledge: of its predictions and its outputs.

With a gate 1 in front of the linear that reads a unit, closing it changes the logits' KL to second order by half its
Fisher information F_u = mean over samples of (dL_n / dgate_u)^2, and the linear's output by W_S x_S with the columns S
that read the unit:

    score_u = F_u + output * E_u sum F / sum E,    E_u = mean over tokens of |W_S x_S|^2 = tr(W_S C_SS W_ST),

with C the second moments of the linear's inputs; sums are over the units of a kind in the block.

Paper: Park et al. 2024, arXiv 2308.03449. Its least-squares reconstruction of what reads the units is `refit` after
this step.
Cost: one backward pass of `samples` samples, with Gram matrices of what they put in. Limits: squares of gradients of
the text's own next tokens stand for those of tokens drawn from the model; units are judged one at a time; the paper
decides and reconstructs block after block.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import (
    EditIO,
    EditScores,
    EditView,
    Thinning,
    added,
    readers_of,
    thinned,
)
from lilliput.verbs.sampled import always, looked_at


class Options(Thinning):
    """See the module's docstring."""

    output: float = Field(1.0, ge=0.0, description="weight of the output error beside the predictions' KL")
    samples: int = Field(32, ge=1, description="calibration samples whose gradients are taken, at most")


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """The knowledge that every head and channel holds."""
    block = view.anatomy
    scores: dict[str, tuple[float, ...]] = {}
    for key, owners in readers_of(block).items():
        if key not in io.gates:
            continue
        lost = added(owners, lambda name, owners=owners: _energy(view, io, name, owners[name]))  # type: ignore[misc]
        fisher, total = io.gates[key].square().mean(0), lost.sum()
        scale = fisher.sum() / total if float(total) != 0.0 else 0.0
        scores[key] = tuple((fisher + o.output * scale * lost).tolist())
    return scores


def _energy(view: EditView, io: EditIO, name: str, owner: Tensor) -> Tensor:
    """For each column j of a linear, the sum over the columns k of its unit of (WT W)_jk C_jk, float64 [in]."""
    stats = io.stats[view.anatomy.linear(name).site]
    moments, weight = stats.need("gram") / max(stats.count, 1), view.weight(name)
    total = torch.zeros(len(owner), dtype=torch.float64)
    counts = torch.bincount(owner[owner >= 0])
    if int(counts.max()) == 1:
        return (weight.double().square().sum(0) * moments.diagonal()).cpu()
    for unit in range(len(counts)):
        own = (owner == unit).nonzero().flatten().to(weight.device)
        columns = weight[:, own].double()
        total[own.cpu()] = (columns.T @ columns * moments[own][:, own]).sum(1).cpu()
    return total


METHOD = Edit(
    paper="Park et al. 2024, arXiv 2308.03449",
    options=Options,
    needs=("gram",),
    covers={
        "kprune": [{"method": "kprune"}, {"method": "refit"}],
    },
    sizes=thinned,
    score=score,
    gates=always,
    looked_at=looked_at,
)
