"""Plain weights of a block, trained on its outputs by Adam; zeros of a mask stay zeros."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lilliput.training import minimise as train
from lilliput.training.descent import DescentOptions, batches, losses
from lilliput.verbs.view import FitBlock, FitIO

RATE = 3e-3  # of a weight's root mean square, for the first step


def descend(
    block: FitBlock, io: FitIO, start: Mapping[str, Tensor], masks: Mapping[str, Tensor], o: DescentOptions
) -> tuple[dict[str, Tensor], float, float]:
    """Weights [out, in] of the least loss that was found, and the losses before and after, as shares of the first.

    start: float32 [out, in] by linear; masks: boolean, where weights may differ from 0. A step of Adam moves a weight
    by the rate times the root mean square of its matrix, falling linearly.
    """
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    rate = RATE if o.lr is None else o.lr
    parameters = [train.Parameter(leaf, rate * float(leaf.detach().square().mean().sqrt())) for leaf in leaves.values()]
    order = batches(len(io.inputs), o)
    scale: list[float] = []

    def whole() -> float:
        with torch.no_grad():
            each = losses(block, io, leaves, range(len(io.inputs)), o)
        if not scale:
            scale.extend(each)
        return sum(each) / max(sum(scale), 1e-30)

    def slope(step: int) -> float:
        chosen = order[step]
        norm = max(sum(scale[n] for n in chosen), 1e-30)
        with torch.enable_grad():
            total = sum(losses(block, io, leaves, chosen, o, backward=norm))
        for name, mask in masks.items():
            gradient = leaves[name].grad
            if gradient is not None:
                gradient.mul_(mask)
        return total / norm

    descent = train.minimise(parameters, slope, whole, train.Schedule(o.iters, 1.0, "adam"))
    return {name: leaf.detach() for name, leaf in leaves.items()}, descent.start, descent.end
