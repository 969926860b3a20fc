"""Soft targets: the student's next-token distribution goes to the teacher's, and to what the text says.

At each token, with logits z of the teacher and v of the student, T the temperature, y the token that follows:

    L = a T^2 KL(p || q) + (1 - a) (-log q_1(y)),    p = softmax(z / T),  q = softmax(v / T),  q_1 = softmax(v).

T^2 keeps the size of gradients alike for all T. `form: survey` is how a survey prints it: no T^2, and the second term
at T too. Where the teacher's probabilities are kept of its likeliest tokens alone (`top` of the training step: a grey
box), the rest is one event, which is exact as `top` reaches the vocabulary; or those tokens are compared as if there
were no others (`rest: renormalised`).

Paper: Hinton et al. 2015, arXiv 1503.02531. Cost: the teacher's forward pass, once for each sample. Limits: both models
have one vocabulary.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from lilliput.algebra.divergences import kl
from lilliput.target import Strict
from lilliput.verbs.objective import Objective, Rest, TokenIO, events


class Options(Strict):
    """See the module's docstring."""

    temperature: float = Field(1.0, gt=0.0, description="T of both distributions")
    soft: float = Field(1.0, ge=0.0, le=1.0, description="a: weight of the teacher; 0: the text alone")
    form: Literal["usual", "survey"] = Field("usual", description="survey: no T^2, and the text's term at T too")
    rest: Rest = Field("bucket", description="tokens that the teacher does not name: one event, or left out")


def loss(io: TokenIO, o: Options) -> Tensor:
    """Of each token, float32 [n]."""
    usual = o.form == "usual"
    total = io.logits.new_zeros(len(io.logits))
    if o.soft > 0:
        log_p, log_q = events(io.logits, io.need_taught(), o.temperature, o.rest)
        total = total + o.soft * (o.temperature**2 if usual else 1.0) * kl(log_p, log_q)
    if o.soft < 1:
        log_q = (io.logits / (1.0 if usual else o.temperature)).log_softmax(-1)
        total = total - (1 - o.soft) * log_q.gather(1, io.labels[:, None])[:, 0]
    return total


METHOD = Objective(
    paper="Hinton et al. 2015, arXiv 1503.02531",
    options=Options,
    covers={
        "logit-kd": [{"method": "wanda"}, {"method": "full", "options": {"objective": "logit-kd"}}],
        "grey-box-kd": [{"method": "wanda"}, {"method": "full", "options": {"objective": "logit-kd", "top": 20}}],
        "teacher-assistant": "it is several commands, each with --teacher: see docs/training-distillation.md",
        "minima": "it is advice on sizes, which the plan gives where a student is too small: see "
        "docs/training-distillation.md",
        "deep-mutual": "two students that learn from each other are two models in one loop, and a run makes one: "
        "distil each from the other's folder in turn",
    },
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=loss,
    temperature=lambda o: o.temperature,
)
