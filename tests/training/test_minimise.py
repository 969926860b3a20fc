"""The loop goes down, keeps the best state it knows, and says so where a loss is no number."""

import math

import pytest
import torch
from torch import Tensor

from lilliput.errors import LilliputError
from lilliput.training.minimise import Parameter, Schedule, minimise


def bowl(x: Tensor) -> Tensor:
    return (x - torch.tensor([1.0, -2.0])).square().sum()


def height(x: Tensor) -> float:
    return float(bowl(x).detach())


def run(x: Tensor, schedule: Schedule, low: float = -math.inf) -> list[Tensor]:
    """The states that the slope was asked in."""
    seen: list[Tensor] = []

    def slope(step: int) -> float:
        assert step == len(seen)
        seen.append(x.detach().clone())
        loss = bowl(x)
        loss.backward()
        return float(loss.detach())

    minimise([Parameter(x, low=low)], slope, lambda: height(x), schedule)
    return seen


def test_signed_steps_fall_linearly() -> None:
    x = torch.zeros(2, requires_grad=True)
    seen = run(x, Schedule(4, 0.4))
    travelled = [0.0, 0.4, 0.7, 0.9]
    for state, far in zip(seen, travelled, strict=True):
        torch.testing.assert_close(state, torch.tensor([far, -far]))
    torch.testing.assert_close(x.detach(), torch.tensor([1.0, -1.0]))


def test_adam_is_torchs() -> None:
    ours, theirs = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    run(ours, Schedule(10, 0.1, "adam"))
    adam = torch.optim.Adam([theirs], lr=0.1)
    for step in range(10):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / 10)
        adam.zero_grad()
        bowl(theirs).backward()
        adam.step()
    torch.testing.assert_close(ours, theirs)


def test_bounds_hold() -> None:
    x = torch.zeros(2, requires_grad=True)
    run(x, Schedule(10, 1.0), low=-0.5)
    assert float(x[1].detach()) == -0.5


def test_the_start_is_kept_where_every_step_is_worse() -> None:
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    done = minimise([Parameter(x)], lambda _: _uphill(x), lambda: height(x), Schedule(5, 0.3))
    assert (done.state, done.start, done.end) == ("start", 0.0, 0.0)
    assert torch.equal(x.detach(), torch.tensor([1.0, -2.0]))


def _uphill(x: Tensor) -> float:
    (-bowl(x) - x.sum()).backward()
    return height(x)


def test_the_best_state_on_the_way_is_kept() -> None:
    x = torch.tensor([0.0, -2.0], requires_grad=True)

    def slope(_: int) -> float:
        x.grad = torch.tensor([-1.0, 0.0])  # goes on beyond the least loss at 1
        return height(x)

    done = minimise([Parameter(x)], slope, lambda: height(x), Schedule(20, 0.25))
    assert done.state == "best"
    assert float(x[0].detach()) == pytest.approx(1.0, abs=0.13)
    assert done.end == pytest.approx(height(x))


def test_a_leaf_without_gradient_stays() -> None:
    x, still = torch.zeros(2, requires_grad=True), torch.ones(3, requires_grad=True)

    def slope(_: int) -> float:
        loss = bowl(x)
        loss.backward()
        return float(loss.detach())

    for rule in ("sign", "adam"):
        minimise([Parameter(x), Parameter(still)], slope, lambda: height(x), Schedule(3, 0.1, rule))
    assert torch.equal(still.detach(), torch.ones(3))


def test_a_loss_that_is_no_number_is_refused() -> None:
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(LilliputError, match=r"nan at step 1.*lower lr"):
        minimise([Parameter(x)], lambda _: math.nan, lambda: 1.0, Schedule(3, 0.1))
