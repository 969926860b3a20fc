"""CAKLD: forward and reverse KL, mixed by how sure the teacher is of the text.

    L = g KL(student || teacher) + (1 - g) KL(teacher || student),    g = mean over the text's tokens of p_teacher(y).

g is computed once, before training, unless it is given: a teacher that is sure of the text lets the student keep to
the likeliest tokens, one that is not has it cover them all.

Paper: Du et al. 2024 (BitDistiller), arXiv 2402.10631. Cost: that of logit-kd. Limits: those of divergence-kd.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field
from torch import Tensor

from lilliput.algebra.divergences import kl
from lilliput.errors import DataError
from lilliput.target import Strict
from lilliput.verbs.objective import Objective, Rest, Taught, TokenIO, events


class Options(Strict):
    """See the module's docstring."""

    gamma: float | None = Field(
        None, ge=0.0, le=1.0, description="share of KL(student || teacher); none: the teacher's mean probability"
    )
    rest: Rest = Field("bucket", description="tokens that the teacher does not name: one event, or left out")


def prepare(taught: Iterable[Taught], o: Options) -> Options:
    """With the share that the text implies."""
    if o.gamma is not None:
        return o
    total, count = 0.0, 0
    for x in taught:
        if x.log_label is None:
            raise RuntimeError("the teacher's probabilities of the text were not kept")
        total += float(x.log_label.double().exp().sum())
        count += len(x.log_label)
    if not count:
        raise DataError("no token of the training text counts: give text with longer answers")
    return o.model_copy(update={"gamma": min(max(total / count, 0.0), 1.0)})


def loss(io: TokenIO, o: Options) -> Tensor:
    """Of each token, float32 [n]."""
    if o.gamma is None:
        raise RuntimeError("prepare() has not been called")
    log_p, log_q = events(io.logits, io.need_taught(), rest=o.rest)
    return o.gamma * kl(log_q, log_p) + (1 - o.gamma) * kl(log_p, log_q)


METHOD = Objective(
    paper="Du et al. 2024 (BitDistiller), arXiv 2402.10631",
    options=Options,
    covers={},
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=loss,
    prepare=prepare,
)
