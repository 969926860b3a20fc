"""Soft targets: the student's next-token distribution goes to the teacher's, and to what the text says.

At each token, with logits z of the teacher and v of the student, T the temperature, y the token that follows:

    L = a T^2 KL(p || q) + (1 - a) (-log q_1(y)),    p = softmax(z / T),  q = softmax(v / T),  q_1 = softmax(v).

T^2 keeps the size of gradients alike for all T. Where the teacher's probabilities are kept of its likeliest tokens
alone, the rest is one event (grey box), which is exact as `top` reaches the vocabulary.

Paper: Hinton et al. 2015, arXiv 1503.02531. Cost: the teacher's forward pass, once for each sample. Limits: both models
have one vocabulary.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from lilliput.target import Strict
from lilliput.verbs.objective import Objective, TokenIO, events


class Options(Strict):
    """See the module's docstring."""

    temperature: float = Field(1.0, gt=0.0, description="T of both distributions")
    soft: float = Field(1.0, ge=0.0, le=1.0, description="a: weight of the teacher; 0: the text alone")


def loss(io: TokenIO, o: Options) -> Tensor:
    """Of each token, float32 [n]."""
    total = io.logits.new_zeros(len(io.logits))
    if o.soft > 0:
        log_p, log_q = events(io.logits, io.need_taught(), o.temperature)
        # Where p is 0 its logarithm is no number to multiply with.
        terms = (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -float("inf"), 0.0)
        total = total + o.soft * o.temperature**2 * terms.sum(1)
    if o.soft < 1:
        hard = -io.logits.log_softmax(-1).gather(1, io.labels[:, None])[:, 0]
        total = total + (1 - o.soft) * hard
    return total


METHOD = Objective(
    paper="Hinton et al. 2015, arXiv 1503.02531",
    options=Options,
    covers={
        "logit-kd": [{"method": "full", "options": {"objective": "logit-kd"}}],
        "grey-box-kd": [{"method": "full", "options": {"objective": "logit-kd", "top": 20}}],
    },
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=loss,
    temperature=lambda o: o.temperature,
)
