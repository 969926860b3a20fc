"""Differentiable subset pruning: exactly K heads of a block stay, found by gradient descent through a relaxed top-K.

The loss with gates z in front of the heads is taken to second order,

    J(z) = g (z - 1) + (z - 1)T F (z - 1) / 2,    F = mean over samples of g_n g_nT,

with g_n the derivative of sample n's cross-entropy by the gates and g their mean, so that heads which can only go one
at a time keep each other. With importances w and Gumbel noise, r = w + noise, a draw of K heads is relaxed to

    p_k = softmax(r_k / t),  r_{k+1} = r_k + log(1 - p_k),  z = p_1 + .. + p_K,

and the mean of J over draws is minimised by w, while the temperature t falls. The K heads of the largest w stay.

Paper: Li et al. 2021, arXiv 2108.04657. By default heads alone leave, as there.
Cost: one backward pass of `samples` samples; the descent is over as many numbers as a block has heads. Limits: the
paper trains w beside all weights on the task's loss; here nothing is trained and the quadratic model of one pass stands
for the loss, block by block. A head is a key-value head with its query group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.target import Strict
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import (
    EditIO,
    EditScores,
    EditView,
    Sizes,
    Units,
    heads_left,
    thinner,
)
from lilliput.verbs.sampled import always, looked_at

_DRAWS, _RATE, _FIRST, _LAST = 64, 0.1, 1.0, 0.1  # draws at a time, step size, temperatures


class Options(Strict):
    """See the module's docstring."""

    ratio: float = Field(0.5, ge=0.0, lt=1.0, description="share of the heads that leaves, rounded down, one at least")
    steps: int = Field(300, ge=1, description="steps of descent")
    seed: int = Field(0, description="of the noise")
    samples: int = Field(32, ge=1, description="calibration samples whose gradients are taken, at most")


def sizes(units: Sequence[Units], o: Options) -> Sizes:
    """Raises PlanError where heads could not be told apart."""
    if not units[0].heads:
        raise PlanError("dsp: the heads of this model could not be told apart: take a method for hidden channels")
    return thinner(units, o.ratio, 1, ("head",))


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """The importances w of a block's heads."""
    if "heads" not in io.gates:
        return {}
    slopes = io.gates["heads"]
    count = slopes.shape[1]
    kept = heads_left(count, o.ratio, alone=True)
    if kept == count:
        return {"heads": tuple(slopes.square().mean(0).tolist())}
    return {"heads": tuple(importances(slopes, kept, o.steps, o.seed).tolist())}


def importances(slopes: Tensor, kept: int, steps: int, seed: int) -> Tensor:
    """w, float64 [heads], whose relaxed draws of `kept` heads have the least mean J; slopes [samples, heads]."""
    slopes = slopes.double().cpu()
    first, second = slopes.mean(0), slopes.T @ slopes / len(slopes)
    scale = float(second.diagonal().mean() + first.abs().mean())
    if scale > 0.0:  # so that one step size fits all
        first, second = first / scale, second / scale
    draw = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        w = torch.zeros(slopes.shape[1], dtype=torch.float64, requires_grad=True)
        descent = torch.optim.Adam([w], lr=_RATE)
        for step in range(steps):
            temperature = _FIRST * (_LAST / _FIRST) ** (step / max(steps - 1, 1))
            uniform = torch.rand(_DRAWS, len(w), dtype=torch.float64, generator=draw).clamp_(1e-12, 1.0 - 1e-12)
            gone = relaxed(w - torch.log(-torch.log(uniform)), kept, temperature) - 1.0
            loss = (gone @ first + 0.5 * (gone @ second * gone).sum(1)).mean()
            descent.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            descent.step()
    return w.detach()


def relaxed(r: Tensor, kept: int, temperature: float) -> Tensor:
    """z [draws, heads], whose rows add up to `kept`: numbers of r [draws, heads] drawn without putting back."""
    total = torch.zeros_like(r)
    for _ in range(kept):
        p = torch.softmax(r / temperature, dim=-1)
        total = total + p
        r = r + torch.log1p(-p.clamp(max=1.0 - 1e-12))
    return total


METHOD = Edit(
    paper="Li et al. 2021, arXiv 2108.04657",
    options=Options,
    needs=(),
    covers={
        "dsp": [{"method": "dsp"}],
    },
    sizes=sizes,
    score=score,
    gates=always,
    looked_at=looked_at,
)
