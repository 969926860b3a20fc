"""SpinQuant's R1: a rotation of the residual stream, learned on the loss of the quantized model.

min over orthogonal R of the cross-entropy with weights Q(W R), Q(RT W): round-to-nearest on the grids of the step that
quantizes later, gradients straight through the rounding. Inputs are rounded as a later step says, where their scales
are found at run time, so the loss is that of the model after both (`weights: false` leaves the weights as they are, as
the paper does in front of GPTQ). Cayley steps R <- (I + a/2 Y)^-1 (I - a/2 Y) R from a random Hadamard matrix, with the
rate falling by a cosine; of all rotations seen, the one with the least loss is returned.

The paper's other rotations are steps of their own: R2 within heads is `head-rotation`, R4 in front of the last linear
of an MLP `online-hadamard`. Neither is learned. Weights behind an online transform are rounded in the loss as if there
were none.

Paper: Liu et al. 2024, arXiv 2405.16406.
Cost: for each step two forward passes and one backward pass of `sequences` samples, one block resident, and one file of
hidden states for each block. Limits: static scales of inputs are not known yet, and their rounding is left out of the
loss. RMS norms without post-norms only. A killed run learns anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import hadamard
from lilliput.algebra.rotations import cayley, orthogonal
from lilliput.errors import PlanError
from lilliput.folds.kinds import ResidualRotation
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
    except PlanError as error:
        return f"{error} (spinquant.kind=orthogonal)"
    return None


def learn(
    model: RotatedModel, samples: Samples | None, targets: Mapping[str, Target], o: Options
) -> Sequence[ResidualRotation]:
    """One rotation. `targets`: what later steps make of each linear, by its full name."""
    if samples is None:
        raise RuntimeError("the rotation is learned from samples, and none were given")
    few = replace(samples, ids=samples.ids[: o.sequences])
    targets = targets if o.weights else {}
    width = model.skeleton.hidden_size
    rotation = hadamard.matrix(width, o.seed) if o.kind == "hadamard" else orthogonal(width, o.seed)
    best, least = rotation, math.inf
    for step in range(o.steps):
        loss, slope = gradient(model, few, targets, rotation)
        best, least = (rotation, loss) if loss < least else (best, least)
        if samples.progress is not None:
            samples.progress.step(step + 1, o.steps, f"learning a rotation, loss {loss:.4f}")
        rotation = cayley(rotation, slope, o.rate * (1 + math.cos(math.pi * step / o.steps)) / 2)
    if o.steps and backward.loss(model.skeleton, _read(model, targets, rotation), few) < least:
        best = rotation
    return (ResidualRotation(best),)


def gradient(
    model: RotatedModel, samples: Samples, targets: Mapping[str, Target], rotation: Tensor
) -> tuple[float, Tensor]:
    """Loss of the rotated and quantized model, and its gradient [hidden, hidden] by the rotation, float64."""
    total = torch.zeros_like(rotation)
    loss = math.nan
    for part in backward.backward(model.skeleton, _read(model, targets, rotation), samples):
        loss = part.loss
        for name, slope in part.tensors.items():
            change = model.change(name)
            if change is None or change.kind == "gain":
                continue
            weight = model.read(name).to(slope)
            # W' = W R for readers, head and bias, W' = RT W for writers; a transposed tensor swaps the two.
            if (change.kind == "writer") != change.transposed:
                total += (weight @ slope.T).double().cpu()
            else:
                rows = (weight, slope) if weight.dim() == 2 else (weight[None], slope[None])
                total += (rows[0].T @ rows[1]).double().cpu()
        if part.block == 0:
            total += _embedding(model, samples, part)
    return loss, total


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


def _read(model: RotatedModel, targets: Mapping[str, Target], rotation: Tensor) -> backward.Read:
    """Tensors as the loss sees them: rotated, and rounded to the grid of a later step."""
    rotated = model.rotated(rotation)
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
            {"method": "spinquant", "options": {"weights": False}},
            {"method": "head-rotation"},
            {"method": "online-hadamard"},
            {"method": "gptq", "target": {"bits": 4, "group_size": "channel"}},
            {"method": "act-static-dynamic", "target": {"bits": 4, "symmetric": False}},
        ],
    },
    run=learn,
    refuse=refuse,
    sequences=lambda o, samples: min(o.sequences, samples),
)
