"""SpinQuant: a rotation of the residual stream, with `r2` of heads too, learned on the loss of the quantized model.

min over orthogonal R of the cross-entropy with weights Q(W R), Q(RT W): round-to-nearest on the grids of the step that
quantizes later, gradients straight through the rounding. Inputs are rounded as a later step says, where their scales
are found at run time, so the loss is that of the model after both (`weights: false` leaves the weights as they are, as
the paper does in front of GPTQ). Cayley steps R <- (I + a/2 Y)^-1 (I - a/2 Y) R from a random Hadamard matrix, with the
rate falling by a cosine; of all rotations seen, the one with the least loss is returned.

`r2`: an R_k for each head k of values in each block is learned with it, V_k <- R_kT V_k and its bias alike, W <- W R_k
on the columns of all query heads that read it. With V and W as they are between R and the rounding,

    dL/dR_k = V_k (dL/dV'_k)T + sum over the stretches s of W that read k of W_sT dL/dW'_s

(and b_k (dL/db'_k)T for a bias), each in a Cayley step of its own at the same rate, from what `head-rotation` gives.
Without `r2` that step takes R_k as it starts. R4 in front of the last linear of an MLP is `online-hadamard`, and not
learned. Weights behind an online transform are rounded in the loss as if there were none.

Paper: Liu et al. 2024, arXiv 2405.16406.
Cost: for each step two forward passes and one backward pass of `sequences` samples, one block resident, and one file of
hidden states for each block; `r2` adds a solve of h x h for each head. Limits: static scales of inputs are not known
yet, and their rounding is left out of the loss. RMS norms without post-norms only. A killed run learns anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import hadamard
from lilliput.algebra.rotations import cayley, orthogonal
from lilliput.errors import PlanError
from lilliput.folds.kinds import HeadRotations, ResidualRotation
from lilliput.formats.integer import from_target
from lilliput.streaming import backward
from lilliput.streaming.backward import Samples
from lilliput.target import Strict, Target
from lilliput.verbs.learn import Learn
from lilliput.verbs.spec import Around

if TYPE_CHECKING:
    from lilliput.model.rotated import RotatedModel  # which imports transformers


class Options(Strict):
    """The paper takes 100 steps on 800 sequences; a few steps on a few already lower the loss."""

    steps: int = Field(4, ge=0, description="descent steps")
    rate: float = Field(1.5, gt=0.0, description="length of the first step")
    sequences: int = Field(8, ge=1, description="calibration samples for the loss")
    kind: Literal["hadamard", "orthogonal"] = Field("hadamard", description="family of the random start")
    seed: int = Field(0, ge=0, description="seed of the start")
    r2: bool = Field(False, description="learn a rotation of each head of values as well")
    weights: bool = Field(
        True, description="round weights in the loss; false where a sweep such as gptq's follows and inputs are rounded"
    )


def refuse(around: Around, o: Options) -> str | None:
    """Why there is nothing to learn, or nothing to start from."""
    if not around.rounded and not (o.weights and around.quantized):
        what = "quantizes" if o.weights else "rounds inputs"
        return f"no later step {what}, so every rotation has the same loss: add such a step, or use hadamard"
    try:
        if o.kind == "hadamard":
            hadamard.factor(around.width)
        heads = {x.head for block in around.anatomy.blocks for x in block.links if x.head} if o.r2 else {0}
        if not heads:
            return "r2 turns heads of values, and none that may be turned was found in this model: leave r2 out"
        for size in heads - {0} if o.kind == "hadamard" else ():
            hadamard.factor(size)
    except PlanError as error:
        return f"{error} (spinquant.kind=orthogonal)"
    return None


def learn(
    model: RotatedModel, samples: Samples | None, targets: Mapping[str, Target], o: Options
) -> Sequence[ResidualRotation | HeadRotations]:
    """One rotation, and those of heads with `r2`. `targets`: what later steps make of each linear, by its full name."""
    if samples is None:
        raise RuntimeError("the rotation is learned from samples, and none were given")
    few = replace(samples, ids=samples.ids[: o.sequences])
    targets = targets if o.weights else {}
    width = model.skeleton.hidden_size
    make = hadamard.matrix if o.kind == "hadamard" else orthogonal
    now = Rotations(make(width, o.seed), _heads(model, make, o) if o.r2 else {})
    best, least = now, math.inf
    for step in range(o.steps):
        loss, slope = gradient(model, few, targets, now)
        best, least = (now, loss) if loss < least else (best, least)
        if samples.progress is not None:
            samples.progress.step(step + 1, o.steps, f"learning a rotation, loss {loss:.4f}")
        now = now.moved(slope, o.rate * (1 + math.cos(math.pi * step / o.steps)) / 2)
    if o.steps and backward.loss(model.skeleton, _read(model, targets, now), few) < least:
        best = now
    whole = ResidualRotation(best.residual)
    return (whole, HeadRotations(best.heads)) if o.r2 else (whole,)


@dataclass(frozen=True)
class Rotations:
    """R [hidden, hidden], and R_k by block, for each of its links, [heads, h, h]; or gradients by them. float64."""

    residual: Tensor
    heads: Mapping[int, Sequence[Tensor]]

    def moved(self, slope: Rotations, rate: float) -> Rotations:
        """After a step of descent."""
        heads = {
            n: [
                torch.stack([cayley(one, by, rate) for one, by in zip(link, slopes, strict=True)])
                for link, slopes in zip(links, slope.heads[n], strict=True)
            ]
            for n, links in self.heads.items()
        }
        return Rotations(cayley(self.residual, slope.residual, rate), heads)


def _heads(model: RotatedModel, make: Callable[[int, int], Tensor], o: Options) -> dict[int, list[Tensor]]:
    """The start: that of `head-rotation`."""
    blocks = enumerate(model.anatomy().blocks)
    heads = {
        n: [
            torch.stack([make(link.head, o.seed + k) for k in range(len(link.heads()[0]))])
            for link in block.links
            if link.head
        ]
        for n, block in blocks
    }
    return {n: links for n, links in heads.items() if links}


def gradient(
    model: RotatedModel, samples: Samples, targets: Mapping[str, Target], now: Rotations
) -> tuple[float, Rotations]:
    """Loss of the rotated and quantized model, and its gradients by the rotations."""
    headed = model.turned(now.heads) if now.heads else model
    whole = model.rotated(now.residual) if now.heads else model
    total = torch.zeros_like(now.residual)
    heads: dict[int, list[Tensor]] = {}
    loss = math.nan
    for part in backward.backward(model.skeleton, _read(model, targets, now), samples):
        loss = part.loss
        for name, slope in part.tensors.items():
            change = model.change(name)
            if change is None or change.kind == "gain":
                continue
            weight = headed.read(name).to(slope)
            # W' = W R for readers, head and bias, W' = RT W for writers; a transposed tensor swaps the two.
            if (change.kind == "writer") != change.transposed:
                total += (weight @ slope.T).double().cpu()
            else:
                rows = (weight, slope) if weight.dim() == 2 else (weight[None], slope[None])
                total += (rows[0].T @ rows[1]).double().cpu()
        if part.block is not None and part.block in now.heads:
            heads[part.block] = _by_heads(whole, part.block, part.tensors)
        if part.block == 0:
            total += _embedding(model, samples, part)
    return loss, Rotations(total, heads)


def _by_heads(whole: RotatedModel, block: int, slopes: Mapping[str, Tensor]) -> list[Tensor]:
    """Gradients [heads, h, h] by the rotations of a block's heads, link by link. `whole`: the model without them."""
    prefix, anatomy = whole.anatomy().block_names[block], whole.anatomy().blocks[block]

    def pair(name: str) -> tuple[Tensor, Tensor]:
        """A tensor and its gradient, [out, in] or [out]."""
        value, slope = whole.read(name).float().cpu(), slopes[name].cpu()
        linear = name.removeprefix(f"{prefix}.").removesuffix(".weight")
        flipped = name.endswith(".weight") and anatomy.linear(linear).transposed
        return (value.T, slope.T) if flipped else (value, slope)

    out: list[Tensor] = []
    for link in (x for x in anatomy.links if x.head):
        rows, which = link.heads()
        total = torch.zeros(len(rows), link.head, link.head, dtype=torch.float64)
        for suffix in ("weight", "bias"):
            if (name := f"{prefix}.{link.producer}.{suffix}") in slopes:
                value, slope = (x[rows] if x.dim() == 2 else x[rows][..., None] for x in pair(name))
                total += (value @ slope.mT).double()
        for reader in link.readers:
            value, slope = (x.reshape(len(x), -1, link.head).transpose(0, 1) for x in pair(f"{prefix}.{reader}.weight"))
            total.index_add_(0, which, (value.mT @ slope).double())
        out.append(total)
    return out


def _embedding(model: RotatedModel, samples: Samples, part: backward.Gradients) -> Tensor:
    """The embedding's share: hidden states h' = h R before the first block."""
    skeleton = model.skeleton
    total = torch.zeros(skeleton.hidden_size, skeleton.hidden_size, dtype=torch.float64)
    model.load(skeleton.embeddings)
    for n in range(len(samples.ids)):
        hidden = skeleton.embed(samples.ids[n : n + 1])[0][0].float().cpu()
        total += (hidden.T @ part.hidden.read(n, n + 1)[0]).double()
    model.unload(skeleton.embeddings)
    return total


def _read(model: RotatedModel, targets: Mapping[str, Target], now: Rotations) -> backward.Read:
    """Tensors as the loss sees them: rotated, and rounded to the grid of a later step."""
    rotated = model.rotated(now.residual)
    rotated = rotated.turned(now.heads) if now.heads else rotated
    flipped = {
        f"{prefix}.{x.name}"
        for prefix, block in zip(model.anatomy().block_names, model.anatomy().blocks, strict=True)
        for x in block.linears
        if x.transposed
    }

    def read(name: str) -> Tensor:
        value = rotated.read(name)
        linear = name.removesuffix(".weight")
        target = targets.get(linear) if name.endswith(".weight") else None
        if target is None:
            return value
        weight = value.float().T.contiguous() if linear in flipped else value.float()
        form = from_target(target)
        grid = form.fit(weight)
        rounded = form.decode(form.encode(weight, grid), grid)
        return rounded.T.contiguous() if linear in flipped else rounded

    return read


METHOD = Learn(
    paper="Liu et al. 2024, arXiv 2405.16406",
    options=Options,
    needs=(),
    recipe=[{"method": "spinquant"}, {"method": "gptq", "target": {"bits": 4}}],
    covers={
        "spinquant": [
            {"method": "spinquant", "options": {"weights": False, "r2": True}},
            {"method": "online-hadamard"},
            {"method": "gptq", "target": {"bits": 4, "group_size": "channel"}},
            {"method": "act-static-dynamic", "target": {"bits": 4, "symmetric": False}},
        ],
    },
    run=learn,
    refuse=refuse,
    sequences=lambda o, samples: min(o.sequences, samples),
)
