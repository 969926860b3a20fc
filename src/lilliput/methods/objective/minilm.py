"""Attention of the last block: its rows, and how its values relate to each other, go to the teacher's.

    L = KL(p || q) + w (mean over heads and tokens of KL(A^T || A)  +  mean over groups and tokens of KL(R^T || R)),
    R = softmax(V V^T / sqrt(d)),

A the attention probabilities and V the values of the last block. R compares all tokens of a row that count, is d-free,
and is the same for all rotations of V, so that depth and width of the two models do not matter, only their numbers of
heads. `soft: 0` trains by attention alone; heads may share values, which are compared once.

Paper: Wang et al. 2020, arXiv 2002.10957. Cost: the teacher stands beside the student, whole in memory, and the last
block's attention of both is formed in float32, heads x tokens^2 numbers a row. Limits: the same numbers of heads and of
groups; attention through transformers' functions, without sinks.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from lilliput.algebra.compared import relation
from lilliput.algebra.divergences import kl
from lilliput.methods.objective import logit_kd
from lilliput.verbs.objective import FeatureIO, Objective, Widths


class Options(logit_kd.Options):
    """See the module's docstring."""

    weight: float = Field(1.0, ge=0.0, description="w: of attention and values, beside that of the distributions")
    values: bool = Field(True, description="compare the relations of values too")


def refuses(widths: Widths, o: Options) -> str | None:
    """Heads are compared one by one."""
    if widths.heads[0] != widths.heads[1] or widths.groups[0] != widths.groups[1]:
        return (
            f"the student has {widths.heads[0]} heads in {widths.groups[0]} groups and its teacher {widths.heads[1]} "
            f"in {widths.groups[1]}, and attention is compared head by head: compare hidden states, with feature-kd"
        )
    return None


def rows(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL of each row of attention, [B, heads, T], of scores [B, heads, T, T]; what neither sees adds nothing."""
    return kl(theirs.detach().log_softmax(-1), ours.log_softmax(-1))


def loss(io: FeatureIO, o: Options) -> Tensor:
    """The term of the last block, a scalar."""
    counted = io.counts[:, None, :].float()
    many = counted.sum().clamp_min(1.0)

    def mean(found: Tensor) -> Tensor:
        return (found * counted).sum() / (many * found.shape[1])

    total = mean(rows(io.student.scores[-1], io.teacher.scores[-1]))
    if o.values:
        theirs = relation(io.teacher.values[-1].detach(), io.counts)
        total = total + mean(kl(theirs, relation(io.student.values[-1], io.counts)))
    return o.weight * total


METHOD = Objective(
    paper="Wang et al. 2020, arXiv 2002.10957",
    options=Options,
    covers={"minilm": [{"method": "wanda"}, {"method": "full", "options": {"objective": "minilm"}}]},
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=logit_kd.loss,
    features_loss=loss,
    sees=lambda o: frozenset({"scores", "values"}) if o.values else frozenset({"scores"}),
    sees_last=True,
    refuses=refuses,
    temperature=lambda o: o.temperature,
)
