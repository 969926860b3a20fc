"""A family of divergences between the teacher's next-token distribution p and the student's q, at each token.

    forward    KL(teacher || student) = sum p log(p / q)       covers all that the teacher may say, tails as well
    reverse    KL(student || teacher) = sum q log(q / p)       keeps to what the teacher finds likely
    jsd        b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q,  b = `beta`
    tv         1/2 sum |p - q|

The first argument is the distribution that the mean is taken over. JSD / b goes to the forward one as b goes to 0, and
JSD / (1 - b) to the reverse one as b goes to 1; other code bases name the two the other way round. All are computed of
logarithms, and multiplied by T^2 for distributions at a temperature T. What the text says may be added:
a D + (1 - a) (-log q(y)), a = `soft`.

Paper: Wen et al. 2023, arXiv 2307.15190; Agarwal et al. 2023, arXiv 2306.13649. Cost: that of logit-kd. Limits: both
models have one vocabulary; where the teacher's probabilities are kept of its likeliest tokens alone, `reverse` and
`jsd` see the others as one event, and so pull less at what the student says beyond them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from lilliput.algebra.divergences import jsd, kl, variation
from lilliput.target import Strict
from lilliput.verbs.objective import Objective, Rest, TokenIO, events

Kind = Literal["forward", "reverse", "jsd", "tv"]


class Options(Strict):
    """See the module's docstring."""

    kind: Kind = Field("forward", description="forward: KL(teacher || student); reverse: KL(student || teacher)")
    beta: float = Field(0.5, gt=0.0, lt=1.0, description="share of the teacher in the mixture of jsd")
    temperature: float = Field(1.0, gt=0.0, description="T of both distributions")
    soft: float = Field(1.0, ge=0.0, le=1.0, description="a: weight of the teacher; 0: the text alone")
    rest: Rest = Field("bucket", description="tokens that the teacher does not name: one event, or left out")


def divergence(kind: Kind, log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """D(p, q) of teacher and student, [n]."""
    if kind == "forward":
        return kl(log_p, log_q)
    if kind == "reverse":
        return kl(log_q, log_p)
    return jsd(log_p, log_q, beta) if kind == "jsd" else variation(log_p, log_q)


def loss(io: TokenIO, o: Options) -> Tensor:
    """Of each token, float32 [n]."""
    total = io.logits.new_zeros(len(io.logits))
    if o.soft > 0:
        log_p, log_q = events(io.logits, io.need_taught(), o.temperature, o.rest)
        total = total + o.soft * o.temperature**2 * divergence(o.kind, log_p, log_q, o.beta)
    if o.soft < 1:
        total = total - (1 - o.soft) * io.logits.log_softmax(-1).gather(1, io.labels[:, None])[:, 0]
    return total


METHOD = Objective(
    paper="Wen et al. 2023, arXiv 2307.15190; Agarwal et al. 2023, arXiv 2306.13649",
    options=Options,
    covers={
        "divergence-kd": [
            {"method": "wanda"},
            {
                "method": "full",
                "options": {"objective": "divergence-kd", "objective_options": {"kind": "jsd", "beta": 0.5}},
            },
        ]
    },
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=loss,
    temperature=lambda o: o.temperature,
)
