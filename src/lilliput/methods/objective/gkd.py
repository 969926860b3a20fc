"""GKD: the student is corrected on text that it has written itself.

    L = (1 - lambda) E over the lessons of D(p, q)  +  lambda E over text y ~ q of D(p, q).

Each step draws its source, the student's own text with probability lambda: it goes on from the beginnings of the
step's lessons, `prompt` tokens of each, or what of it does not count. No gradient passes through the drawing; prompts
and whatever follows an end of text do not count. D is as in divergence-kd: forward KL(teacher || student), reverse, or
jsd with the teacher's share `beta` (libraries that number D from 0 to 1 mean forward by 0 and reverse by 1).

Paper: Agarwal et al. 2023, arXiv 2306.13649. Cost: the teacher stands beside the student, whole in memory; writing a
text of n tokens takes n passes of the student with a cache of its keys and values, and a second copy of its weights.
Limits: the student must write sensible text already; rows hold one document; one process.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.methods.objective.divergence_kd import divergence
from lilliput.target import Strict
from lilliput.verbs.objective import Objective, Rollout, RolloutIO, TokenIO, events


class Options(Strict):
    """See the module's docstring."""

    on_policy: float = Field(0.5, ge=0.0, le=1.0, description="lambda: share of steps on the student's own text")
    kind: Literal["forward", "reverse", "jsd"] = Field("jsd", description="D: forward is KL(teacher || student)")
    beta: float = Field(0.5, gt=0.0, lt=1.0, description="share of the teacher in the mixture of jsd")
    sampling: float = Field(1.0, gt=0.0, description="temperature at which the student writes")
    prompt: int = Field(16, ge=1, description="tokens of a lesson that are given, where all of it counts")


def rollout(io: RolloutIO, o: Options) -> Rollout | None:
    """The student's own text, or the lessons."""
    if float(torch.rand(())) >= o.on_policy:
        return None
    return Rollout(*io.write(0.0, o.sampling, o.prompt))


def loss(io: TokenIO, o: Options) -> Tensor:
    """Of each token, float32 [n]."""
    return divergence(o.kind, *events(io.logits, io.need_taught()), o.beta)


METHOD = Objective(
    paper="Agarwal et al. 2023, arXiv 2306.13649",
    options=Options,
    covers={"gkd": [{"method": "wanda"}, {"method": "full", "options": {"objective": "gkd"}}]},
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=loss,
    rolls=lambda o: o.on_policy > 0,
    rollout=rollout,
)
