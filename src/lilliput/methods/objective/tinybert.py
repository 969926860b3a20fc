"""All that a block shows: embeddings, hidden states and attention before its softmax go to the teacher's.

    L = a KL(p || q) + (1 - a) (-log q(y)) + w (D(M_0 e, e^T) + mean over l of D(M h_l, h^T_{g(l)})
                                               + mean over l of mean square of (S_l - S^T_{g(l)})),

e what enters the first block, h_l what block l has made, S_l the attention scores of all pairs that may see each other,
g every k-th block, D the mean square of differences, relative to the teacher's own by default. M_0 and M are learned
linear maps where the widths differ, one M for all blocks, and left behind.

The paper trains twice, on general text and then on that of the task: those are two steps with other `data`. Its own
ablation finds the second to matter more.

Paper: Jiao et al. 2020, arXiv 1909.10351. Cost: the teacher stands beside the student, whole in memory; attention
scores of all blocks of both, blocks x heads x tokens^2 numbers a row. Limits: the same number of heads; attention
through transformers' functions, without sinks.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from lilliput.algebra.compared import Scale, distance, side_by_side
from lilliput.methods.objective import logit_kd
from lilliput.verbs.objective import FeatureIO, Objective, Widths


class Options(logit_kd.Options):
    """See the module's docstring."""

    weight: float = Field(1.0, ge=0.0, description="w: of what blocks show, beside that of the distributions")
    attention: bool = Field(True, description="compare attention scores")
    scale: Scale = Field("layer", description="what hidden states are relative to: the teacher's size, or vectors' own")


def refuses(widths: Widths, o: Options) -> str | None:
    """Heads are compared one by one."""
    if o.attention and widths.heads[0] != widths.heads[1]:
        return (
            f"the student has {widths.heads[0]} heads and its teacher {widths.heads[1]}, and attention is compared "
            "head by head: set attention: false, or compare hidden states, with feature-kd"
        )
    return None


def maps(widths: Widths, o: Options) -> nn.Module | None:
    """Of the embedding, and of all blocks; None where the widths are the same."""
    if widths.student == widths.teacher:
        return None
    return nn.ModuleList(nn.Linear(widths.student, widths.teacher, bias=False) for _ in range(2))


def loss(io: FeatureIO, o: Options) -> Tensor:
    """The terms beside the distributions, a scalar."""
    ours, theirs = [x.float() for x in io.student.hidden], io.teacher.hidden
    if io.maps is not None:
        first, others = io.maps.children()
        ours = [first(ours[0]), *(others(x) for x in ours[1:])]
    places = side_by_side(len(ours) - 1, len(theirs) - 1, "skip")
    total = distance(ours[0], theirs[0], io.counts, "l2", o.scale)
    pairs = [distance(x, theirs[n], io.counts, "l2", o.scale) for x, n in zip(ours[1:], places, strict=True)]
    total = total + torch.stack(pairs).mean()
    if o.attention:
        scores = [
            _scores(x, io.teacher.scores[n - 1].detach(), io.counts)
            for x, n in zip(io.student.scores, places, strict=True)
        ]
        total = total + torch.stack(scores).mean()
    return o.weight * total


def _scores(ours: Tensor, theirs: Tensor, counts: Tensor) -> Tensor:
    """Mean square over the pairs that see each other in both, in the rows that count."""
    seen = ours.isfinite() & theirs.isfinite() & counts[:, None, :, None]
    difference = torch.where(seen, ours, 0.0) - torch.where(seen, theirs, 0.0)
    return difference.square().sum() / seen.sum().clamp_min(1)


METHOD = Objective(
    paper="Jiao et al. 2020, arXiv 1909.10351",
    options=Options,
    covers={"tinybert": [{"method": "wanda"}, {"method": "full", "options": {"objective": "tinybert"}}]},
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=logit_kd.loss,
    features_loss=loss,
    sees=lambda o: frozenset({"hidden", "scores"}) if o.attention else frozenset({"hidden"}),
    maps=maps,
    refuses=refuses,
    temperature=lambda o: o.temperature,
)
