"""The learned rotation: its gradient against whole-model autograd, its steps, and that they pay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.func import functional_call

from lilliput import api
from lilliput.algebra import hadamard
from lilliput.algebra.rotations import cayley, orthogonal
from lilliput.errors import LilliputError, PlanError
from lilliput.folds.kinds import HeadRotations, ResidualRotation
from lilliput.formats.integer import from_target
from lilliput.methods.learn import spinquant
from lilliput.methods.rewrite import head_rotation
from lilliput.model.rotated import RotatedModel
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.plan.plan import make
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe, Step
from lilliput.run.editing import prepared
from lilliput.runtime import inputs
from lilliput.streaming import backward
from lilliput.streaming.backward import Samples
from lilliput.target import Target
from lilliput.verbs.view import BlockIO, BlockView

Tiny = Callable[[str], Path]
GRID = Target(bits=3, group_size=8, symmetric=False, scale_dtype="float32")


def reference(
    toy: Any, rotation: Tensor, target: Target | None, heads: Mapping[int, Sequence[Tensor]] | None = None
) -> tuple[float, Tensor, dict[int, Tensor]]:
    """Loss and its gradients by the rotation and by those of heads, through the whole model at once; rounding passes
    gradients through."""
    r = rotation.float().requires_grad_()
    turns = {n: x[0].float().requires_grad_() for n, x in (heads or {}).items()}
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
        turn = turns.get(int(name.split(".")[2])) if "layers" in name else None
        if turn is not None and "v_proj" in name:
            w = torch.cat([turn[k].T @ part for k, part in enumerate(w.split(turn.shape[1]))])
        if turn is not None and "o_proj.weight" in name:
            parts = w.split(turn.shape[1], 1)  # query heads, several to a head of values
            w = torch.cat([part @ turn[k * len(turn) // len(parts)] for k, part in enumerate(parts)], 1)
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
    slope, *more = torch.autograd.grad(out, [r, *turns.values()])
    return out.item(), slope, dict(zip(turns, more, strict=True))


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
    heads = drawn(ready, 7)
    for some in ({}, heads):
        now = spinquant.Rotations(rotation, some)
        loss, slope = spinquant.gradient(ready, Samples(toy.ids, tmp_path), targets, now)
        value, expected, by_heads = reference(toy, rotation, target, some)
        assert loss == pytest.approx(value, rel=1e-5)
        assert float((slope.residual.float() - expected).norm() / expected.norm()) < 1e-4
        assert slope.heads.keys() == by_heads.keys() == some.keys()
        for n, other in by_heads.items():
            (own,) = slope.heads[n]
            assert float((own.float() - other).norm() / other.norm()) < 1e-4


def test_the_gradient_composes_with_a_rotation_that_is_there_already(
    toy: Any, ready: RotatedModel, tmp_path: Path
) -> None:
    first, second = orthogonal(24, seed=5), orthogonal(24, seed=6)
    samples = Samples(toy.ids, tmp_path)
    one, two = spinquant.Rotations(second, {}), spinquant.Rotations(first @ second, {})
    _, slope = spinquant.gradient(ready.rotated(first), samples, linears(toy, GRID), one)
    _, whole = spinquant.gradient(ready, samples, linears(toy, GRID), two)
    assert float((slope.residual - first.T @ whole.residual).norm() / slope.residual.norm()) < 1e-4


def residual(folds: Sequence[ResidualRotation | HeadRotations]) -> Tensor:
    """The matrix of the only rotation there is."""
    (fold,) = folds
    assert isinstance(fold, ResidualRotation)
    return fold.matrix


def drawn(ready: RotatedModel, seed: int) -> dict[int, list[Tensor]]:
    """Rotations of all heads of values."""
    out = {}
    for n, block in enumerate(ready.anatomy().blocks):
        (link,) = (x for x in block.links if x.head)
        out[n] = [torch.stack([orthogonal(link.head, seed + 10 * n + k) for k in range(len(link.heads()[0]))])]
    return out


def test_turned_heads_leave_the_loss_and_compose(ready: RotatedModel, toy: Any, tmp_path: Path) -> None:
    samples = Samples(toy.ids, tmp_path)
    one, two = drawn(ready, 1), drawn(ready, 2)
    turned = ready.turned(one).rotated(orthogonal(24, 3)).turned(two)
    before, after = (backward.loss(x.skeleton, x.read, samples) for x in (ready, turned))
    assert after == pytest.approx(before, rel=1e-5)
    name = next(x for x in ready.skeleton.names_of(1) if x.endswith("v_proj.weight"))
    product = {n: [a @ b for a, b in zip(one[n], two[n], strict=True)] for n in one}
    again = ready.turned(product).rotated(orthogonal(24, 3))
    torch.testing.assert_close(turned.read(name), again.read(name))
    assert torch.equal(turned.read_rows(name, 1, 3), turned.read(name)[1:3])
    assert not torch.allclose(turned.read(name), ready.rotated(orthogonal(24, 3)).read(name))
    with pytest.raises(LilliputError, match="no rotations of the heads"):
        ready.turned({0: [2 * x for x in one[0]]})


def test_heads_are_learned_with_the_residual_stream(toy: Any, ready: RotatedModel, tmp_path: Path) -> None:
    samples, targets = Samples(toy.ids, tmp_path), linears(toy, GRID)

    def learned(steps: int) -> spinquant.Rotations:
        o = spinquant.Options(steps=steps, r2=True, kind="orthogonal", rate=0.3)
        whole, heads = spinquant.learn(ready, samples, targets, o)
        assert isinstance(whole, ResidualRotation)
        assert isinstance(heads, HeadRotations)
        return spinquant.Rotations(whole.matrix, heads.blocks)

    start, end = learned(0), learned(6)
    losses = [backward.loss(ready.skeleton, spinquant._read(ready, targets, x), samples) for x in (start, end)]
    assert losses[1] < losses[0]
    block = ready.anatomy().blocks[0]
    from_step = head_rotation.rewrite(
        BlockView(block, {}), BlockIO({}), Target(), head_rotation.Options(kind="orthogonal")
    )
    assert torch.equal(start.heads[0][0], from_step[0].matrices)
    assert not torch.equal(end.heads[0][0], start.heads[0][0])
    for links in end.heads.values():
        for one in links[0]:
            torch.testing.assert_close(one.T @ one, torch.eye(len(one), dtype=torch.float64), rtol=0, atol=1e-10)
    assert not list(tmp_path.iterdir())


def test_without_heads_the_rotation_is_that_of_the_residual_stream_alone(
    toy: Any, ready: RotatedModel, tmp_path: Path
) -> None:
    """The steps, written out; byte for byte."""
    samples, targets = Samples(toy.ids, tmp_path), linears(toy, GRID)
    rotation = hadamard.matrix(24, 0)
    seen = []
    for step in range(3):
        loss, slope = spinquant.gradient(ready, samples, targets, spinquant.Rotations(rotation, {}))
        seen.append((loss, rotation))
        rotation = cayley(rotation, slope.residual, 1.5 * (1 + math.cos(math.pi * step / 3)) / 2)
    last = backward.loss(ready.skeleton, spinquant._read(ready, targets, spinquant.Rotations(rotation, {})), samples)
    expected = min([*seen, (last, rotation)], key=lambda x: x[0])[1]
    (found,) = spinquant.learn(ready, samples, targets, spinquant.Options(steps=3))
    assert isinstance(found, ResidualRotation)
    assert torch.equal(found.matrix, expected)


@pytest.mark.slow
def test_a_folder_with_learned_heads_computes_what_the_model_did(tiny: Tiny, tmp_path: Path) -> None:
    recipe = (
        "export: lilliput\nsteps:\n  - {method: spinquant, options: {r2: true, steps: 2}}\n"
        "  - {method: rtn, target: {bits: 8, group_size: 16}}\n"
        "  - {method: act-static-dynamic, target: {bits: 8}}\n"
    )
    api.compress(tiny("qwen2"), tmp_path / "out", recipe=recipe, samples=2, tokens=32, eval_windows=0, progress=Quiet())
    ids = torch.arange(2, 34).view(1, -1)
    with torch.no_grad():
        ours, theirs = (
            tf.AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32)(ids).logits
            for x in (tmp_path / "out", tiny("qwen2"))
        )
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05


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
    loss, found = spinquant.gradient(ready, samples, {}, spinquant.Rotations(rotation, {}))
    slope = found.residual
    value, expected, _ = reference(toy, rotation, None)
    assert loss == pytest.approx(value, rel=1e-3)  # an input between two codes may fall to either side
    assert float((slope.float() - expected).norm() / expected.norm()) < 0.05
    options = [spinquant.Options(steps=n, weights=False, rate=0.02) for n in (0, 10)]
    start, end = (residual(spinquant.learn(ready, samples, linears(toy, GRID), o)) for o in options)
    before, after = (
        backward.loss(ready.skeleton, spinquant._read(ready, {}, spinquant.Rotations(r, {})), samples)
        for r in (start, end)
    )
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
        return backward.loss(
            ready.skeleton, spinquant._read(ready, targets, spinquant.Rotations(rotation, {})), samples
        )

    start, end = (residual(spinquant.learn(ready, samples, targets, spinquant.Options(steps=n))) for n in (0, 6))
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
