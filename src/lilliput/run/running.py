"""A loaded block as a function of its weights and inputs, and how far other weights move what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from lilliput.anatomy.model import Block
from lilliput.model.weights import Model
from lilliput.streaming.forward import Batches
from lilliput.streaming.states import Activations
from lilliput.verbs.view import Run


def runner(model: Model, index: int, anatomy: Block, batches: Batches) -> Run:
    """A loaded block as a function of the weights of its linears and its inputs; see `FitBlock`.

    Where the skeleton computes in half precision, matrix products do too, while hidden states, norms and biases stay
    float32: differences between two runs are then those of the weights, not of rounded sums.
    """
    skeleton = model.skeleton
    transposed = {x.name for x in anatomy.linears if x.transposed}
    small = _vector_names(model, index)
    half = skeleton.dtype is not torch.float32
    calls = dict(batches.calls)

    def run(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        count = len(hidden)
        if count not in calls:
            calls[count] = skeleton.calls(count, hidden.shape[1])
        tensors = {name: skeleton.tensor(full).float() for name, full in small.items()}
        for name, value in weights.items():
            if value.dim() == 1:
                tensors[name] = value
            else:
                tensors[f"{name}.weight"] = value.T if name in transposed else value
        device = torch.device(skeleton.device).type
        with torch.autocast(device, skeleton.dtype) if half else nullcontext():
            return skeleton.run(index, hidden.float(), calls[count], tensors).float()

    return run


def movement(
    model: Model, index: int, anatomy: Block, batches: Batches, inputs: Activations
) -> Callable[[Mapping[str, Tensor]], float]:
    """How far other weights move the outputs of a loaded block; see `BlockIO.movement`.

    Looks at the first two samples, each by itself: neither the size of batches nor the number of processes matters.
    """
    samples = range(min(2, len(inputs)))
    device = model.skeleton.device
    before: list[Tensor] = []
    run: Run | None = None

    def moved(weights: Mapping[str, Tensor]) -> float:
        nonlocal run
        if run is None:
            run = runner(model, index, anatomy, batches)
            before.extend(run({}, inputs.read(n, n + 1).to(device)) for n in samples)
        total, tokens = 0.0, 0
        for n, was in zip(samples, before, strict=True):
            change = run(weights, inputs.read(n, n + 1).to(device)) - was
            # Token by token, as a norm after it sees them: a few are a hundred times larger than the others.
            share = change.square().sum(-1) / was.square().sum(-1).clamp(min=1e-30)
            total += float(share.sum(dtype=torch.float64))
            tokens += share.numel()
        return total / tokens

    return moved


def vectors(model: Model, index: int) -> dict[str, Tensor]:
    """Gains and biases of a loaded block by their names in it, float32."""
    return {name: model.skeleton.tensor(full).float() for name, full in _vector_names(model, index).items()}


def _vector_names(model: Model, index: int) -> dict[str, str]:
    skeleton = model.skeleton
    length = len(skeleton.block_names[index]) + 1
    return {n[length:]: n for n in skeleton.names_of(index) if _float(skeleton.tensor(n)) == 1}


def _float(tensor: Tensor) -> int:
    return tensor.dim() if tensor.is_floating_point() else -1
