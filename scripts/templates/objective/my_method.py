"""replace: one line that says what my-method does. Now: squared distances of probabilities.

replace: the equations. At each token, p the teacher's and q the student's probabilities of what the teacher names:

    L = sum (p - q)^2

Paper: replace: authors, year, arXiv number. Cost: replace: the teacher's forward pass, once for each sample. Limits:
replace: both models have one vocabulary.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from lilliput.target import Strict
from lilliput.verbs.objective import Objective, TokenIO, events


class Options(Strict):
    """replace: your options, each with a default and a description."""

    temperature: float = Field(1.0, gt=0.0, description="T of both distributions")


def loss(io: TokenIO, o: Options) -> Tensor:
    """Of each token, float32 [n]."""
    # replace: from here on
    log_p, log_q = events(io.logits, io.need_taught(), o.temperature)
    return (log_p.exp() - log_q.exp()).square().sum(1)


METHOD = Objective(
    paper="replace: authors, year, arXiv number",
    options=Options,
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=loss,
    temperature=lambda o: o.temperature,
)
