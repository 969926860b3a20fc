"""Optimal brain surgeon against its equations, row by row in float64."""

import torch
from torch import Tensor

from lilliput.methods.weight import obd, obs
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target

ROWS, WIDTH = 10, 32


def _case(seed: int = 0) -> tuple[Tensor, SiteStats, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=g) * torch.exp(0.5 * torch.randn(WIDTH, generator=g))
    x = torch.randn(300, WIDTH, generator=g) @ mix / WIDTH**0.5
    gram = x.T @ x
    h = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    return torch.randn(ROWS, WIDTH, generator=g), SiteStats(WIDTH, 300, gram=gram), h


def _support(layer: Layer) -> Tensor:
    assert layer.support is not None
    return layer.support


def test_one_removal_is_the_surgeons_and_costs_what_it_says() -> None:
    """Zero, update and loss of a single weight a row, to 1e-5 of them."""
    w, stats, h = _case()
    inverse = torch.linalg.inv(h)
    layer = obs.compress(Layer("x", w), stats, Target(sparsity=1 / WIDTH), obs.Options(shrinkage=0.0, steps=200))
    for row in range(ROWS):
        cost = w[row].double().square() / (2 * inverse.diagonal())
        q = int(cost.argmin())
        assert (~_support(layer)[row]).nonzero().flatten().tolist() == [q]
        expected = w[row].double() - w[row, q].double() / inverse[q, q] * inverse[:, q]
        expected[q] = 0.0
        got = layer.decode()[row].double()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        miss = w[row].double() - got
        torch.testing.assert_close(0.5 * miss @ h @ miss, cost[q], rtol=1e-4, atol=0)


def test_the_joint_update_is_the_least_squares_solution_of_each_row() -> None:
    """Also -H^-1[:, Q] ([H^-1]_QQ)^-1 w_Q, as printed."""
    w, stats, h = _case(1)
    inverse = torch.linalg.inv(h)
    for target in (Target(sparsity=0.5), Target(pattern="2:4")):
        layer = obs.compress(Layer("x", w), stats, target, obs.Options(shrinkage=0.0, steps=500))
        for row in range(ROWS):
            removed = (~_support(layer)[row]).nonzero().flatten()
            solved = torch.linalg.solve(inverse[removed][:, removed], w[row, removed].double())
            expected = w[row].double() - inverse[:, removed] @ solved
            torch.testing.assert_close(layer.decode()[row].double(), expected, rtol=0, atol=1e-3)


def test_a_diagonal_hessian_makes_it_obd_without_update() -> None:
    w, _, _ = _case(2)
    scale = torch.exp(torch.randn(WIDTH, generator=torch.Generator().manual_seed(5)))
    stats = SiteStats(WIDTH, 300, gram=torch.diag(scale), square=scale)
    target = Target(sparsity=0.5)
    surgeon = obs.compress(Layer("x", w), stats, target, obs.Options(damping=0.0, shrinkage=0.0))
    damage = obd.compress(Layer("x", w), stats, target, obd.Options(curvature="gram", scope="row"))
    assert torch.equal(_support(surgeon), _support(damage))
    assert torch.equal(surgeon.decode(), damage.decode())


def test_more_steps_never_lose() -> None:
    w, stats, h = _case(3)
    losses = []
    for steps in (0, 1, 3, 10, 100):
        options = obs.Options(shrinkage=0.0, steps=steps)
        miss = (w - obs.compress(Layer("x", w), stats, Target(sparsity=0.6), options).decode()).double()
        losses.append(float(((miss @ h) * miss).sum()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]
