"""Training of the weights that a mask keeps: zeros stay, the loss falls, and a convex case reaches least squares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput import api
from lilliput.anatomy.model import Block, Groups, Linear
from lilliput.errors import LilliputError, PlanError
from lilliput.methods.fit.block import Options, fit
from lilliput.model.stored import open_model
from lilliput.parts.layer import Layer
from lilliput.progress import Quiet
from lilliput.streaming.states import Activations
from lilliput.target import Target
from lilliput.verbs.view import FitBlock, FitIO

Tiny = Callable[[str], Path]
WIDTH = 8


@pytest.fixture
def bench(tmp_path: Path) -> tuple[FitBlock, FitIO, Tensor, Tensor]:
    """A block that is one linear, half of whose weights are gone."""
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(6 * 20, WIDTH, generator=draw) @ torch.randn(WIDTH, WIDTH, generator=draw)).view(6, 20, WIDTH)
    weight = torch.randn(WIDTH, WIDTH, generator=draw)
    mask = torch.rand(WIDTH, WIDTH, generator=draw) < 0.5

    def run(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return hidden @ weights.get("a", weight).T

    stores = []
    for name, value in (("x", x), ("y", run({}, x))):
        stores.append(Activations(tmp_path / name, (6, 20, WIDTH), torch.float32, create=True))
        stores[-1].write(0, value)
    block = Block((Linear("a", "down", "a", WIDTH, WIDTH),), (), (), Groups())
    layer = Layer("a", weight).with_support(mask)
    return FitBlock(block, {"a": layer}, run), FitIO({}, stores[0], stores[1], 2), x.flatten(0, 1), weight


def test_kept_weights_approach_the_masked_least_squares(bench: Any) -> None:
    block, io, x, weight = bench
    o = Options(iters=400, batch=6, lr=0.05, weigh="alike")
    done = fit(block, io, {"a": Target()}, o)
    layer = done.layers["a"]
    mask = block.layers["a"].need_support()
    assert bool((layer.decode()[~mask] == 0).all())
    assert done.end < done.start == pytest.approx(1.0)
    best = torch.zeros_like(weight)
    for row in range(WIDTH):  # each output by itself
        columns = x[:, mask[row]]
        best[row, mask[row]] = torch.linalg.lstsq(columns, x @ weight[row]).solution

    def error(w: Tensor) -> float:
        return float((x @ (w - weight).T).square().mean())

    assert error(layer.decode()) < 1.02 * error(best) + 1e-6
    assert error(layer.decode()) < 0.8 * error(block.layers["a"].decode())


def test_no_steps_leave_the_start(bench: Any) -> None:
    block, io, _, _ = bench
    done = fit(block, io, {"a": Target()}, Options(iters=0))
    assert torch.equal(done.layers["a"].decode(), block.layers["a"].decode())


def test_a_layer_that_is_not_pruned_is_refused(bench: Any) -> None:
    block, io, _, weight = bench
    with pytest.raises(LilliputError, match="not pruned"):
        fit(FitBlock(block.anatomy, {"a": Layer("a", weight)}, block.run), io, {"a": Target()}, Options())


def test_it_runs_after_a_pruner_and_keeps_its_zeros(tiny: Tiny, tmp_path: Path) -> None:
    room: dict[str, Any] = {"samples": 4, "tokens": 32, "device": "cpu", "dtype": "float32"}
    recipe = "steps:\n  - {method: wanda, target: {sparsity: 0.5}}\n  - {method: block, options: {iters: 8}}\n"
    done = api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, eval_windows=0, progress=Quiet(), **room)
    assert all(end <= start for start, end in (row["block_loss"] for row in done.rows))
    model = open_model(tmp_path / "out")
    weight = model.read("model.layers.1.mlp.down_proj.weight")
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    with pytest.raises(PlanError, match="prunes"):
        api.plan(tiny("llama"), recipe="steps: [{method: block}]\n", **room)
