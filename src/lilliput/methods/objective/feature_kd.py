"""Hidden states: each block of the student goes to what a block of the teacher has made of the same text.

    L = a KL(p || q) + (1 - a) (-log q(y)) + w mean over blocks l of D(M_l h_l, h^T_{g(l)}).

The first two terms are those of logit-kd. D is the mean square (`l2`) or the mean size (`l1`) of the differences, or
1 - cos (`cosine`), over the places whose next token counts, and by default relative to the teacher's own size in that
layer, so that layers count alike; `scale: token` compares vectors of one length. g maps blocks: every k-th (`skip`),
the last ones (`last`), or, anew for each batch, the block that is nearest (`dynamic`). M_l is the identity, or, where
the two widths differ, a linear map that is learned with the student and left behind.

Papers: Romero et al. 2015, arXiv 1412.6550; Sun et al. 2019 (skip and last, vectors of one length), arXiv 1908.09355;
Sanh et al. 2019 (cosine), arXiv 1910.01108. Cost: the teacher stands beside the student, whole in memory, and runs for
every batch. Limits: `dynamic` compares all pairs of blocks; sentences have no token of their own in a causal model, so
all tokens are compared.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lilliput.algebra.compared import Distance, Scale, distance, nearest, side_by_side
from lilliput.methods.objective import logit_kd
from lilliput.verbs.objective import FeatureIO, Objective, Widths


class Options(logit_kd.Options):
    """See the module's docstring."""

    weight: float = Field(1.0, ge=0.0, description="w: of the hidden states, beside that of the distributions")
    distance: Distance = Field("l2", description="D")
    scale: Scale = Field("layer", description="what l2 and l1 are relative to: the teacher's size, or vectors' own")
    layers: Literal["skip", "last", "dynamic"] = Field("skip", description="which blocks stand side by side")


def maps(widths: Widths, o: Options) -> nn.Module | None:
    """A linear map for each block; None where the widths are the same."""
    if widths.student == widths.teacher:
        return None
    return nn.ModuleList(nn.Linear(widths.student, widths.teacher, bias=False) for _ in range(widths.blocks))


def mapped(io: FeatureIO) -> list[Tensor]:
    """What each block of the student has made, in the teacher's width."""
    ours = io.student.hidden[1:]
    if io.maps is None:
        return list(ours)
    return [layer(x.float()) for layer, x in zip(io.maps.children(), ours, strict=True)]


def loss(io: FeatureIO, o: Options) -> Tensor:
    """The term of hidden states, a scalar."""
    ours, theirs = mapped(io), io.teacher.hidden[1:]

    def between(a: Tensor, b: Tensor) -> Tensor:
        return distance(a, b, io.counts, o.distance, o.scale)

    if o.layers == "dynamic":
        costs = [[between(a.detach(), b) for b in theirs] for a in ours]
        chosen = nearest(costs)
    else:
        chosen = tuple(n - 1 for n in side_by_side(len(ours), len(theirs), o.layers))
    return o.weight * torch.stack([between(a, theirs[n]) for a, n in zip(ours, chosen, strict=True)]).mean()


METHOD = Objective(
    paper="Romero et al. 2015, arXiv 1412.6550; Sun et al. 2019, arXiv 1908.09355",
    options=Options,
    covers={
        "feature-kd": [{"method": "wanda"}, {"method": "full", "options": {"objective": "feature-kd"}}],
        "pkd": [
            {"method": "wanda"},
            {
                "method": "full",
                "options": {
                    "objective": "feature-kd",
                    "objective_options": {"scale": "token", "layers": "skip", "soft": 0.5},
                },
            },
        ],
        "distilbert": [
            {"method": "drop-layers", "options": {"blocks": 1, "rule": "alternate"}},
            {
                "method": "full",
                "options": {"objective": "feature-kd", "objective_options": {"distance": "cosine", "soft": 0.5}},
            },
        ],
    },
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=logit_kd.loss,
    features_loss=loss,
    sees=lambda o: frozenset({"hidden"}),
    maps=maps,
    temperature=lambda o: o.temperature,
)
