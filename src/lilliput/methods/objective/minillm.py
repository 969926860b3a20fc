"""MiniLLM: the reverse KL of whole texts, by policy gradient.

A text is drawn token by token from p~ = a p + (1 - a) q, teacher and student together, after the beginning of a lesson.
With r_t = log p(y_t) - log q(y_t) and the mean of what is still to come, R_t = sum over t' > t of r_t' / their number,

    gradient = grad KL(q_t || p_t) at each place  -  w_t R_t grad log q(y_t),    w_t = q(y_t) / p~(y_t),

where w_t is a loss -min(w_t R_t, clip(w_t, 1 - e, 1 + e) R_t) as in PPO; the gradient passes through w_t alone. The
lessons themselves are read as well, with `plain` times their cross-entropy.

Paper: Gu et al. 2023, arXiv 2306.08543. Cost: the teacher stands beside the student, whole in memory, and writes with
it; every step trains on twice as many rows. Limits: the student must write sensible text already, so train it on the
lessons first, and take a small learning rate (the paper: 5e-6); without the teacher's share it learns to repeat itself,
without the mean over what is to come, to stop early. A text is used for one step, so that the clip bounds the weights
of what the teacher has written. Rows hold one document; one process.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra.divergences import kl, mixed
from lilliput.target import Strict
from lilliput.verbs.objective import Objective, Rollout, RolloutIO, TokenIO, events


class Options(Strict):
    """See the module's docstring."""

    teacher_share: float = Field(0.2, ge=0.0, lt=1.0, description="a: of the teacher in what is drawn from")
    clip: float | None = Field(0.2, gt=0.0, lt=1.0, description="e: bound on w_t; none: no bound")
    normalised: bool = Field(True, description="mean of what is to come; false: its sum")
    plain: float = Field(1.0, ge=0.0, description="weight of the lessons' own cross-entropy; 0: they are not read")
    prompt: int = Field(16, ge=1, description="tokens of a lesson that are given, where all of it counts")


def returns(rewards: Tensor, counts: Tensor, normalised: bool) -> Tensor:
    """R_t, [B, T], of rewards [B, T] at the tokens that count."""
    kept = rewards * counts
    later = kept.flip(1).cumsum(1).flip(1) - kept
    if not normalised:
        return later
    many = counts.float()
    return later / (many.flip(1).cumsum(1).flip(1) - many).clamp_min(1.0)


def rollout(io: RolloutIO, o: Options) -> Rollout:
    """What both have written, and the lessons after it. extra: 1 for what was written, R_t, log p~(y_t)."""
    ids, counts = io.write(o.teacher_share, 1.0, o.prompt)
    log_q, log_p = io.judge(ids)
    drawn = mixed(log_p, log_q, o.teacher_share)
    extra = torch.stack([torch.ones_like(log_q), returns(log_p - log_q, counts, o.normalised), drawn], -1)
    if o.plain == 0:
        return Rollout(ids, counts, extra)
    return Rollout(
        torch.cat([ids, io.ids]), torch.cat([counts, io.counts]), torch.cat([extra, torch.zeros_like(extra)])
    )


def loss(io: TokenIO, o: Options) -> Tensor:
    """Of each token, float32 [n]."""
    if io.extra is None:
        raise RuntimeError("rollout() has not been called")
    written, future, drawn = io.extra.unbind(-1)
    log_p, log_q = events(io.logits, io.need_taught())
    own = io.logits.log_softmax(-1).gather(1, io.labels[:, None])[:, 0]
    # Outside what was written w is of no use, and may be anything.
    weight = torch.where(written > 0, own - drawn, 0.0).exp()
    gain = weight * future
    if o.clip is not None:
        gain = torch.minimum(gain, weight.clamp(1 - o.clip, 1 + o.clip) * future)
    return torch.where(written > 0, kl(log_q, log_p) - gain, -o.plain * own)


METHOD = Objective(
    paper="Gu et al. 2023, arXiv 2306.08543",
    options=Options,
    covers={"minillm": [{"method": "wanda"}, {"method": "full", "options": {"objective": "minillm", "lr": 5e-6}}]},
    recipe="it is no step: a training step names it as its objective",
    tokens_loss=loss,
    rolls=lambda o: True,
    rollout=rollout,
)
