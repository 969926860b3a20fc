"""TSLD: distillation whose tokens weigh more, the less the teacher expects them.

    L = sum_t w_t (-sum_k p_t(k) log q_t(k)),    w = softmax over the tokens t of a sample of (-log p_t(y_t)) / tau.

Weights depend on the teacher and the text alone, and are multiplied by the number of tokens, so that a teacher that
expects all tokens alike gives the plain mean. The cross-entropy with the teacher is its KL and the teacher's own
entropy, which no gradient sees: the KL is what is computed.

Paper: Kim et al. 2023, arXiv 2308.06744. Cost: that of logit-kd. Limits: those of logit-kd.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from lilliput.algebra.divergences import kl
from lilliput.target import Strict
from lilliput.verbs.objective import Objective, Rest, TokenIO, events


class Options(Strict):
    """See the module's docstring."""

    tau: float = Field(10.0, gt=0.0, description="how evenly tokens weigh")
    rest: Rest = Field("bucket", description="tokens that the teacher does not name: one event, or left out")


def weigh(log_label: Tensor, o: Options) -> Tensor:
    """Factors on the losses of a sample's tokens, [n], whose mean is 1."""
    return (-log_label / o.tau).softmax(0) * len(log_label)


def loss(io: TokenIO, o: Options) -> Tensor:
    """Of each token, float32 [n], before it is weighed."""
    return kl(*events(io.logits, io.need_taught(), rest=o.rest))


METHOD = Objective(
    paper="Kim et al. 2023, arXiv 2308.06744",
    options=Options,
    covers={
        "tsld": [
            {"method": "rtn", "target": {"bits": 2, "group_size": 64}},
            {"method": "lsq", "options": {"objective": "tsld"}},
        ]
    },
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=loss,
    weigh=weigh,
)
