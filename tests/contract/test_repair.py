"""What every method that repairs an edited block owes its callers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput import methods
from lilliput.parts.layer import Layer
from lilliput.streaming.states import Activations
from lilliput.verbs.repair import Consumer, Repair, RepairIO
from lilliput.verbs.view import FitBlock, FitIO

REPAIR = sorted(n for n, m in methods.discover().items() if isinstance(m.spec, Repair))
SAMPLES, LENGTH, KEPT = 4, 20, 72


@pytest.fixture
def bench(toy: Any, tmp_path: Path) -> tuple[FitBlock, RepairIO, dict[str, Tensor]]:
    """The toy block without a quarter of its hidden channels, and what the whole one gives."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, LENGTH, 48, generator=draw)
    kept = torch.arange(KEPT)
    thin = dict(toy.tensors) | {"up": toy.tensors["up"][:KEPT], "down": toy.tensors["down"][:, :KEPT]}

    def run(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        out: Tensor = toy.forward(thin | dict(weights), hidden.reshape(-1, 48))
        return out.view(hidden.shape)

    stores = []
    for name, value in (("x", x), ("y", toy.forward(toy.tensors, x.reshape(-1, 48)).view(x.shape))):
        stores.append(Activations(tmp_path / name, (SAMPLES, LENGTH, 48), torch.float32, create=True))
        stores[-1].write(0, value)
    normed = x / x.square().mean(-1, keepdim=True).sqrt() * toy.tensors["norm2"]
    inner = torch.relu(normed @ toy.tensors["up"].T)
    halves = tuple(part.flatten(0, 1).T @ part.flatten(0, 1) for part in inner.split(SAMPLES // 2))

    def passes(name: str, weights: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        for n in range(SAMPLES):
            rows = slice(n, n + 1)
            yield n // 2, inner[rows][..., :KEPT], run(weights, x[rows]), stores[1].read(n, n + 1)

    layers = {name: Layer(name, thin[name]) for name in (linear.name for linear in toy.block.linears)}
    consumers = {"down": Consumer(toy.tensors["down"], (halves[0], halves[1]), kept)}
    io = RepairIO(FitIO({}, stores[0], stores[1], 2), lambda: consumers, passes)
    return FitBlock(toy.block, layers, run), io, thin


@pytest.mark.parametrize("name", REPAIR)
def test_new_weights_fit_their_linears_repeat_and_leave_inputs_alone(name: str, bench: Any) -> None:
    block, io, thin = bench
    method: Any = methods.get(name)
    before = {key: value.clone() for key, value in thin.items()}
    options = method.parse({"iters": 6} if "iters" in method.options.model_fields else {})
    first, again = (method.spec.run(block, io, options) for _ in range(2))
    assert first.keys() <= block.layers.keys()
    for key, value in first.items():
        assert value.shape == block.layers[key].weight.shape
        assert value.dtype == torch.float32
        assert bool(torch.isfinite(value).all())
        assert torch.equal(value, again[key])
    assert all(torch.equal(thin[key], value) for key, value in before.items())
    wanted, given = io.fit.targets.read(0, SAMPLES), io.fit.inputs.read(0, SAMPLES)
    lost = [float((block.run(w, given) - wanted).square().sum()) for w in ({}, first)]
    assert lost[1] <= 1.05 * lost[0]
