"""Groups of inputs that leave one after the other, against least squares on what stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.algebra.obs import regularized
from lilliput.algebra.removal import removal


def least_error(weight: Tensor, matrix: Tensor, gone: list[int]) -> float:
    """tr(D H DT) with the best change D whose columns `gone` are those of -W."""
    kept = [j for j in range(len(matrix)) if j not in gone]
    change = torch.zeros_like(weight)
    change[:, gone] = -weight[:, gone]
    if kept:
        pull = weight[:, gone] @ matrix[gone][:, kept]
        change[:, kept] = torch.linalg.solve(matrix[kept][:, kept], pull.T).T
    return float((change @ matrix * change).sum())


def problem(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * width, width, generator=draw) @ torch.randn(width, width, generator=draw)
    return torch.randn(rows, width, generator=draw).double(), x.T @ x


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_each_time_the_group_leaves_whose_loss_is_least(size: int) -> None:
    weight, gram = problem(5, 12, size)
    groups = torch.randperm(12, generator=torch.Generator().manual_seed(1)).reshape(-1, size)
    order, errors = removal(weight, gram, groups, 0.01)
    matrix = regularized(gram, 0.01, 0.0).double()
    whole = float((weight @ matrix * weight).sum())
    gone: list[int] = []
    left = set(range(len(groups)))
    for k, error in zip(order.tolist(), errors.tolist(), strict=True):
        costs = {n: least_error(weight, matrix, gone + groups[n].tolist()) for n in left}
        assert k == min(costs, key=lambda n: costs[n])
        assert error * whole == pytest.approx(costs[k], rel=1e-6)
        gone += groups[k].tolist()
        left.discard(k)
    assert float(errors[-1]) == pytest.approx(1.0, rel=1e-9)


def test_the_first_single_column_costs_what_optimal_brain_surgeon_says() -> None:
    weight, gram = problem(4, 9, 7)
    matrix = regularized(gram, 0.01, 0.0).double()
    costs = weight.square().sum(0) / torch.linalg.inv(matrix).diagonal()
    order, errors = removal(weight, gram, torch.arange(9)[:, None], 0.01)
    assert int(order[0]) == int(costs.argmin())
    assert float(errors[0]) * float((weight @ matrix * weight).sum()) == pytest.approx(float(costs.min()), rel=1e-6)


@pytest.mark.parametrize("size", [1, 5])
def test_panels_change_nothing_but_speed(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    weight, gram = problem(30, 300, 9)
    groups = torch.arange(300).reshape(-1, size)
    order, errors = removal(weight, gram, groups, 0.01)
    monkeypatch.setattr("lilliput.algebra.removal._PANEL", 1)
    again, expected = removal(weight, gram, groups, 0.01)
    assert torch.equal(order, again)
    torch.testing.assert_close(errors, expected, rtol=1e-8, atol=1e-12)


def test_inputs_that_never_came_and_weights_of_nothing() -> None:
    order, errors = removal(torch.eye(4), torch.zeros(4, 4), torch.arange(4)[:, None], 0.01)
    torch.testing.assert_close(errors, torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    _, errors = removal(torch.zeros(4, 4), torch.eye(4), torch.arange(4)[:, None], 0.01)
    assert not bool(errors.any())
