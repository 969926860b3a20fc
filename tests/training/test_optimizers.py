"""AdamW against torch's, by where its moments are kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lilliput.training import moments
from lilliput.training.moments import dynamic
from lilliput.training.optimizers import BYTES, AdamW, Leaf, held_back

SHAPES = ((70, 90), (300, 33), (5,), (0, 4))


def problem(seed: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Leaves, and gradients of some steps, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(shape, generator=generator) for shape in SHAPES]
    sizes = [10.0 ** -(n % 4) for n in range(12)]
    return leaves, [[torch.randn(x.shape, generator=generator) * size for x in leaves] for size in sizes]


def ours(kind: str, folder: Path, interrupted: bool = False) -> list[Tensor]:
    leaves, slopes = problem(0)
    values = [nn.Parameter(x.clone()) for x in leaves]
    named = [Leaf(str(n), x, 1.0 + n, 0.1 * n) for n, x in enumerate(values)]
    optimizer = AdamW(named, kind, folder)
    for step, some in enumerate(slopes):
        for x, slope in zip(values, some, strict=True):
            x.grad = None if step == 1 and x is values[1] else slope.clone()
        optimizer.step(1e-2 / (1 + step))
        if interrupted and step == 6:
            saved = {name: x.clone() for name, x in optimizer.state(7).items()}
            optimizer.settled(7)
            optimizer.step(1.0)  # what comes after the state is forgotten
            for x in values:
                x.grad = torch.ones_like(x)
            before = [x.detach().clone() for x in values]
            optimizer.step(1.0)
            for x, old in zip(values, before, strict=True):
                x.data.copy_(old)
            optimizer = AdamW(named, kind, folder)
            optimizer.restore(saved, 7)
    optimizer.delete()
    assert not any(folder.iterdir())
    return [x.detach() for x in values]


def torchs() -> list[Tensor]:
    leaves, slopes = problem(0)
    values = [nn.Parameter(x.clone()) for x in leaves]
    groups = [{"params": [x], "weight_decay": 0.1 * n} for n, x in enumerate(values)]
    optimizer = torch.optim.AdamW(groups, foreach=False)
    for step, some in enumerate(slopes):
        for n, (group, x, slope) in enumerate(zip(optimizer.param_groups, values, some, strict=True)):
            group["lr"] = 1e-2 / (1 + step) * (1.0 + n)
            x.grad = None if step == 1 and x is values[1] else slope.clone()
        optimizer.step()
    return [x.detach() for x in values]


@pytest.mark.parametrize("kind", ["adamw", "paged"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_steps_are_those_of_torch_bit_for_bit(kind: str, interrupted: bool, tmp_path: Path) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours(kind, tmp_path, interrupted), torchs(), strict=True))


def test_moments_in_8_bits_move_weights_nearly_alike(tmp_path: Path) -> None:
    start = problem(0)[0]
    for a, b, x in zip(ours("adamw-8bit", tmp_path), torchs(), start, strict=True):
        if x.numel() < moments.SMALL:
            assert torch.equal(a, b)
        else:
            assert float((a - b).norm() / (b - x).norm()) < 0.03
    for a, b in zip(ours("adamw-8bit", tmp_path, True), ours("adamw-8bit", tmp_path), strict=True):
        assert torch.equal(a, b)


def test_the_dynamic_type() -> None:
    for signed in (True, False):
        table = dynamic(signed)
        assert len(table) == 256
        assert bool((table.diff() > 0).all())
        assert float(table[-1]) == 1.0
        assert float(table.abs().min()) == 0.0
    positive = dynamic(False)
    slow = [0.0]
    for e in range(8):
        for f in range(2 ** (7 - e)):
            slow.append(10.0**-e * (0.1 + 0.9 * (f + 0.5) / 2 ** (7 - e)))
    slow.sort()
    assert positive[:-1].tolist() == pytest.approx(slow[:-1])


def test_what_8_bits_hold(tmp_path: Path) -> None:
    like = torch.randn(80, 80, generator=torch.Generator().manual_seed(0))
    held = moments.Rounded({"x": like})
    second = like.square() * 10.0 ** torch.linspace(-9, 0, 80)
    held.put(0, like, second)
    first, found = held.take(0)
    near = like.abs() > 0.1 * like.abs().amax()
    assert float(((first - like).abs() / like.abs())[near].max()) < 0.071  # half of 0.9 / 64 at 0.1
    assert bool((found > 0).all()), "a step would divide by nothing"
    size = sum(x.numel() * x.element_size() for x in held.state(0).values())
    assert size <= BYTES["adamw-8bit"] * like.numel()


def test_gradients_are_held_back_to_a_norm() -> None:
    slopes = [torch.full((3, 4), 2.0), torch.full((13,), -2.0)]
    assert held_back(slopes, 1.0) == pytest.approx(10.0)
    assert math.sqrt(sum(float(x.square().sum()) for x in slopes)) == pytest.approx(1.0)
    before = [x.clone() for x in slopes]
    assert held_back(slopes, None) == pytest.approx(1.0)
    assert all(torch.equal(a, b) for a, b in zip(slopes, before, strict=True))
