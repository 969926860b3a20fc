"""Relations: how layers, or tokens, relate to each other in the teacher is what the student goes to, not the states.

    kind flow (FSP):  G_l = F_l^T F_{l+1} / tokens,  [H, H], of the states before and after a block, at one length,
    kind pairwise:    G_l = cosines between all tokens of a row after block l,  [tokens, tokens],

    L = a KL(p || q) + (1 - a) (-log q(y)) + w mean over l of |G_l - G^T_{g(l)}|^2 / |G^T_{g(l)}|^2,

g every k-th block. Neither needs a map: flow needs one width for both models, pairwise any two.

Papers: Yim et al. 2017 (flow), CVPR, "A gift from knowledge distillation"; Tung and Mori 2019 (pairwise),
arXiv 1907.09682. Cost: the teacher stands beside the student, whole in memory. Limits: a relation says nothing of where
states are; keep the term of the distributions.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra.compared import flow, side_by_side, similarities
from lilliput.methods.objective import logit_kd
from lilliput.verbs.objective import FeatureIO, Objective, Widths


class Options(logit_kd.Options):
    """See the module's docstring."""

    kind: Literal["flow", "pairwise"] = Field("pairwise", description="between layers, or between tokens")
    weight: float = Field(1.0, ge=0.0, description="w: of the relations, beside that of the distributions")


def refuses(widths: Widths, o: Options) -> str | None:
    """Flow compares channels one by one."""
    if o.kind == "flow" and widths.student != widths.teacher:
        return (
            f"the student's width is {widths.student} and its teacher's {widths.teacher}, and flow compares channels "
            "one by one: use kind: pairwise"
        )
    return None


def loss(io: FeatureIO, o: Options) -> Tensor:
    """The term of the relations, a scalar."""
    ours, theirs = io.student.hidden, [x.detach() for x in io.teacher.hidden]
    terms: list[Tensor] = []
    before = 0
    for n, place in enumerate(side_by_side(len(ours) - 1, len(theirs) - 1, "skip"), start=1):
        if o.kind == "flow":
            own, other = flow(ours[n - 1], ours[n], io.counts), flow(theirs[before], theirs[place], io.counts)
        else:
            own, other = similarities(ours[n], io.counts), similarities(theirs[place], io.counts)
        terms.append((own - other).square().sum() / other.square().sum().clamp_min(1e-12))
        before = place
    return o.weight * torch.stack(terms).mean()


METHOD = Objective(
    paper="Yim et al. 2017, CVPR; Tung and Mori 2019, arXiv 1907.09682",
    options=Options,
    covers={"relation-kd": [{"method": "wanda"}, {"method": "full", "options": {"objective": "relation-kd"}}]},
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=logit_kd.loss,
    features_loss=loss,
    sees=lambda o: frozenset({"hidden"}),
    refuses=refuses,
    temperature=lambda o: o.temperature,
)
