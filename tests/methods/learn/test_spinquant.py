"""The learned rotation: its gradient against whole-model autograd, its steps, and that they pay."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from lilliput.algebra.rotations import cayley, orthogonal
from lilliput.errors import PlanError
from lilliput.formats.integer import from_target
from lilliput.methods.learn import spinquant
from lilliput.model.rotated import RotatedModel
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.plan.plan import make
from lilliput.recipe.schema import Recipe, Step
from lilliput.run.editing import prepared
from lilliput.runtime import inputs
from lilliput.streaming import backward
from lilliput.streaming.backward import Samples
from lilliput.target import Target

GRID = Target(bits=3, group_size=8, symmetric=False, scale_dtype="float32")


def reference(toy: Any, rotation: Tensor, target: Target | None) -> tuple[float, Tensor]:
    """Loss and its gradient by the rotation, through the whole model at once; rounding passes gradients through."""
    r = rotation.float().requires_grad_()
    old = dict(toy.whole.named_parameters())

    def rounded(w: Tensor) -> Tensor:
        if target is None:
            return w
        form = from_target(target)
        fixed = w.detach().contiguous()
        grid = form.fit(fixed)
        return w + (form.decode(form.encode(fixed, grid), grid) - fixed)

    new: dict[str, Tensor] = {}
    for name, value in old.items():
        w = value.detach()
        prefix = name.split("self_attn")[0].split("mlp")[0]
        linear = name.endswith("_proj.weight")
        if linear and not ("o_proj" in name or "down_proj" in name):
            gain = old[prefix + ("input" if "self_attn" in name else "post_attention") + "_layernorm.weight"].detach()
            new[name] = rounded((w * gain) @ r)
        elif linear:
            new[name] = rounded(r.T @ w)
        elif name.endswith("o_proj.bias"):
            new[name] = w @ r
        elif "norm" in name:
            new[name] = torch.ones_like(w)
        elif "embed" in name:
            new[name] = w @ r
            new["lm_head.weight"] = (w * old["model.norm.weight"].detach()) @ r
        else:
            new[name] = w
    toy.whole.lm_head.weight = torch.nn.Parameter(torch.empty(48, 24))
    try:
        logits = functional_call(toy.whole, new, kwargs={"input_ids": toy.ids, "use_cache": False}).logits
    finally:
        toy.whole.tie_weights()
    out = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), toy.ids[:, 1:].flatten())
    (slope,) = torch.autograd.grad(out, r)
    return out.item(), slope


@pytest.fixture
def ready(toy: Any) -> RotatedModel:
    return RotatedModel(toy.model)


def linears(toy: Any, target: Target) -> dict[str, Target]:
    anatomy = toy.model.anatomy()
    return {
        f"{p}.{x.name}": target for p, b in zip(anatomy.block_names, anatomy.blocks, strict=True) for x in b.linears
    }


@pytest.mark.parametrize("target", [None, GRID], ids=["unquantized", "3 bits"])
def test_the_gradient_is_the_whole_models(toy: Any, ready: RotatedModel, target: Target | None, tmp_path: Path) -> None:
    rotation = orthogonal(24, seed=5)
    targets = {} if target is None else linears(toy, target)
    loss, slope = spinquant.gradient(ready, Samples(toy.ids, tmp_path), targets, rotation)
    value, expected = reference(toy, rotation, target)
    assert loss == pytest.approx(value, rel=1e-5)
    assert float((slope.float() - expected).norm() / expected.norm()) < 1e-4


def test_the_gradient_composes_with_a_rotation_that_is_there_already(
    toy: Any, ready: RotatedModel, tmp_path: Path
) -> None:
    first, second = orthogonal(24, seed=5), orthogonal(24, seed=6)
    samples = Samples(toy.ids, tmp_path)
    _, slope = spinquant.gradient(ready.rotated(first), samples, linears(toy, GRID), second)
    _, whole = spinquant.gradient(ready, samples, linears(toy, GRID), first @ second)
    assert float((slope - first.T @ whole).norm() / slope.norm()) < 1e-4


@pytest.fixture
def rounding(toy: Any, ready: RotatedModel) -> Iterator[None]:
    """All linears of the blocks round their inputs to 4 bits, in both models."""
    anatomy = toy.model.anatomy()
    modules = [
        model.get_submodule(f"{prefix}.{x.name}")
        for prefix, block in zip(anatomy.block_names, anatomy.blocks, strict=True)
        for x in block.linears
        for model in (ready.skeleton.model, toy.whole)
    ]
    for module in modules:
        inputs.attach(module, inputs.Rounding(InputGrid(UniformInput(4))))
    yield
    for module in modules:
        inputs.detach(module)


@pytest.mark.usefixtures("rounding")
def test_rounded_inputs_are_part_of_the_loss(toy: Any, ready: RotatedModel, tmp_path: Path) -> None:
    rotation, samples = orthogonal(24, seed=5), Samples(toy.ids, tmp_path)
    loss, slope = spinquant.gradient(ready, samples, {}, rotation)
    value, expected = reference(toy, rotation, None)
    assert loss == pytest.approx(value, rel=1e-3)  # an input between two codes may fall to either side
    assert float((slope.float() - expected).norm() / expected.norm()) < 0.05
    options = [spinquant.Options(steps=n, weights=False, rate=0.05) for n in (0, 10)]
    start, end = (spinquant.learn(ready, samples, linears(toy, GRID), o)[0].matrix for o in options)
    before, after = (backward.loss(ready.skeleton, spinquant._read(ready, {}, r), samples) for r in (start, end))
    assert after < before


def test_steps_stay_orthogonal_and_go_down() -> None:
    rng = torch.Generator().manual_seed(0)
    wanted, rotation = orthogonal(16, 1), orthogonal(16, 2)
    if float(torch.linalg.det(wanted)) * float(torch.linalg.det(rotation)) < 0:
        wanted[:, 0] *= -1  # steps cannot leave the component that they start in
    scale = torch.rand(16, 1, generator=rng, dtype=torch.float64) + 0.5
    losses = []
    for _ in range(150):
        miss = (rotation - wanted) * scale
        losses.append(float(miss.square().sum()))
        rotation = cayley(rotation, 2 * miss * scale, 0.1)
        torch.testing.assert_close(rotation.T @ rotation, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
    assert all(b <= a + 1e-12 for a, b in pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(cayley(rotation, torch.zeros(16, 16, dtype=torch.float64), 1.0), rotation)


def test_learning_lowers_the_loss_of_the_quantized_model(toy: Any, ready: RotatedModel, tmp_path: Path) -> None:
    samples, targets = Samples(toy.ids, tmp_path), linears(toy, GRID)

    def loss(rotation: Tensor) -> float:
        return backward.loss(ready.skeleton, spinquant._read(ready, targets, rotation), samples)

    start, end = (spinquant.learn(ready, samples, targets, spinquant.Options(steps=n))[0].matrix for n in (0, 6))
    assert loss(end) < loss(start)
    torch.testing.assert_close(end.T @ end, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-10)
    assert not list(tmp_path.iterdir())


def test_without_a_grid_there_is_nothing_to_learn(toy: Any) -> None:
    recipe = Recipe(steps=(Step(method="spinquant"), Step(method="magnitude")))
    with pytest.raises(PlanError, match="no later step quantizes"):
        make(
            prepared(toy.model, recipe), recipe, samples=1, tokens=8, budget=None, size=None, seed=None,
            dtype=torch.float32,
        )  # fmt: skip

    steps = (Step(method="spinquant", options={"weights": False}), Step(method="gptq", target=Target(bits=4)))
    with pytest.raises(PlanError, match="no later step rounds inputs"):
        make(
            prepared(toy.model, Recipe(steps=steps)), Recipe(steps=steps), samples=1, tokens=8, budget=None, size=None,
            seed=None, dtype=torch.float32,
        )  # fmt: skip
