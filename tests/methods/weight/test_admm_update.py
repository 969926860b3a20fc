"""The ADMM update against its equations, and against least squares row by row, in float64."""

import pytest
import torch
from torch import Tensor

from lilliput.methods.weight import admm_update, sparsegpt, wanda
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target

ROWS, WIDTH = 12, 40


def _case(seed: int = 0) -> tuple[Tensor, SiteStats, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=g) * torch.exp(torch.randn(WIDTH, generator=g))
    x = torch.randn(300, WIDTH, generator=g) @ mix / WIDTH**0.5
    gram = x.T @ x
    h = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    return torch.randn(ROWS, WIDTH, generator=g), SiteStats(WIDTH, 300, gram=gram, square=gram.diagonal().clone()), h


def _pruned(w: Tensor, stats: SiteStats, **target: object) -> Layer:
    return wanda.compress(Layer("x", w), stats, Target.model_validate(target), wanda.Options())


def _support(layer: Layer) -> Tensor:
    assert layer.support is not None
    return layer.support


def _losses(w: Tensor, layer: Layer, h: Tensor) -> Tensor:
    miss = (w - layer.decode()).double()
    return ((miss @ h) * miss).sum(1)


@pytest.mark.parametrize(("steps", "rho"), [(1, 1.0), (20, 1.0), (20, 0.3)])
def test_equals_the_printed_iteration(steps: int, rho: float) -> None:
    """To 1e-4; every row gains, so none is left as it was."""
    w, stats, h = _case()
    pruned = _pruned(w, stats, sparsity=0.5)
    mask, norm = _support(pruned).double(), h.diagonal().sqrt()
    scaled, matrix = w.double() * norm, h / norm / norm[:, None]
    a = torch.linalg.inv(matrix + rho * torch.eye(WIDTH, dtype=torch.float64))
    z, t = scaled * mask, torch.zeros_like(scaled)
    for _ in range(steps):
        v = (scaled @ matrix + rho * (z - t)) @ a
        z = mask * (v + t)
        t = t + v - z
    options = admm_update.Options(steps=steps, rho=rho, shrinkage=0.0)
    got = admm_update.compress(pruned, stats, Target(), options)
    torch.testing.assert_close(got.decode().double(), z / norm, rtol=0, atol=1e-4)
    assert bool((_losses(w, got, h) < _losses(w, pruned, h)).all())


def test_converges_to_the_least_squares_solution_of_each_row() -> None:
    w, stats, h = _case(1)
    pruned = _pruned(w, stats, sparsity=0.5)
    got = admm_update.compress(pruned, stats, Target(), admm_update.Options(steps=2000, rho=0.3, shrinkage=0.0))
    root = torch.linalg.cholesky(h).T  # |root (w - v)|^2 is the loss
    for row in range(ROWS):
        kept = _support(pruned)[row].nonzero().flatten()
        best = torch.linalg.lstsq(root[:, kept], (root @ w[row].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(got.decode()[row, kept].double(), best, rtol=0, atol=1e-2)
        least = (root @ w[row].double() - root[:, kept] @ best).square().sum()
        assert float(_losses(w, got, h)[row]) <= 1.001 * float(least)


def test_a_full_mask_gives_the_weight_itself() -> None:
    w, stats, _ = _case()
    full = Layer("x", w, support=torch.ones_like(w, dtype=torch.bool))
    torch.testing.assert_close(admm_update.compress(full, stats, Target(), admm_update.Options()).decode(), w)


def test_no_row_ends_worse_than_sparsegpts_update_on_the_same_mask() -> None:
    for seed in range(4):
        w, stats, h = _case(seed)
        for target in (Target(sparsity=0.5), Target(pattern="2:4")):
            first = sparsegpt.compress(Layer("x", w), stats, target, sparsegpt.Options(shrinkage=0.0))
            for steps in (0, 1, 20):
                options = admm_update.Options(steps=steps, shrinkage=0.0)
                second = admm_update.compress(first, stats, target, options)
                assert torch.equal(_support(second), _support(first))
                before, after = _losses(w, first, h), _losses(w, second, h)
                assert bool((after <= before * (1 + 1e-4)).all())
            assert float(after.sum()) < 0.97 * float(before.sum())
