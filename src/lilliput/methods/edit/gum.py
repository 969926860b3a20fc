"""GUM: of hidden channels that do nearly the same only the one that matters most stays, then those that matter most.

A channel's importance is the sum of |w g| over its rows of gate and up and its column of down, with g the gradient of
the mean cross-entropy. Two channels are alike where the cosine of their activations at the input of down,
|G_ij| / sqrt(G_ii G_jj) with the Gram matrix G, is above `alike`. In order of importance a channel is unique where it
is like no unique one before it. All others leave before any unique channel does. Heads are compared by importance
alone.

Paper: Santacroce et al. 2023, arXiv 2302.03773. By default only hidden channels leave, as there.
Cost: one backward pass of `samples` samples, with Gram matrices of what they put in. Limits: the paper adds movement
up while it fine-tunes; here the gradients at hand stand for it, and no weight is trained. What an alike channel gave is
lost until `refit` hands it to the one that stays.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Thinning, by_member, thinned
from lilliput.verbs.sampled import always, looked_at


class Options(Thinning):
    """See the module's docstring."""

    alike: float = Field(0.8, gt=0.0, le=1.0, description="cosine above which two channels do the same")
    samples: int = Field(10, ge=1, description="calibration samples whose gradients are taken, at most")


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """Importance; of channels that are not unique, less the largest of the block."""
    block = view.anatomy
    movement: dict[str, Tensor] = {}

    def of(name: str, axis: str, index: slice | Tensor) -> Tensor:
        if name not in movement:
            movement.clear()
            movement[name] = (view.weight(name) * io.gradients[name]).double().abs_()
        return movement[name][index].sum(1) if axis == "rows" else movement[name][:, index].sum(0)

    scores = dict(by_member(view, of))
    for m, mlp in enumerate(block.groups.channels):
        importance = torch.tensor(scores[f"channels.{m}"], dtype=torch.float64)
        gram = io.stats[block.linear(mlp.readers[0]).site].need("gram")[: mlp.width, : mlp.width]
        kept = unique(gram, importance, o.alike).cpu()
        scores[f"channels.{m}"] = tuple(torch.where(kept, importance, importance - importance.max()).tolist())
    return scores


def unique(gram: Tensor, importance: Tensor, alike: float) -> Tensor:
    """Whether each channel is like no unique one of greater importance (among equals: before it), bool [n].

    All channels at once: whoever is like no undecided one before it is unique, whoever is like a unique one is not, and
    again until none is undecided.
    """
    count = len(gram)
    order = torch.sort(importance.to(gram.device), descending=True, stable=True).indices
    size = gram.diagonal().sqrt()
    cosine = (gram / size.clamp(min=1e-30)[:, None] / size.clamp(min=1e-30)).abs_()[order][:, order]
    # before[i, j]: j comes before i and is like it.
    before = (cosine > alike).tril_(-1).float()
    del cosine
    open_, kept = torch.ones(count, device=gram.device), torch.zeros(count, device=gram.device)
    while bool(open_.any()):
        new = open_ * (before @ open_ == 0)
        kept += new
        open_ = (open_ - new) * (before @ new == 0)
    result = torch.zeros(count, dtype=torch.bool, device=gram.device)
    result[order] = kept.bool()
    return result


METHOD = Edit(
    paper="Santacroce et al. 2023, arXiv 2302.03773",
    options=Options,
    needs=("gram",),
    covers={
        "gum": [{"method": "gum"}],
    },
    sizes=thinned,
    score=score,
    gradients=always,
    looked_at=looked_at,
)
