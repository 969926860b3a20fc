"""Least squares on what stays, against lstsq."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lilliput.methods.repair.refit import Normal, caught_up, refitted
from lilliput.streaming.states import Activations
from lilliput.verbs.repair import Consumer, RepairIO
from lilliput.verbs.view import FitIO


def halved(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[::2].T @ x[::2], x[1::2].T @ x[1::2]


def data(tokens: int = 200, width: int = 10) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=draw) @ torch.randn(width, width, generator=draw)
    return x, torch.randn(6, width, generator=draw)


def test_what_stays_is_fitted_to_the_whole_output() -> None:
    x, weight = data()
    kept = torch.tensor([0, 1, 4, 5, 9])
    found = refitted(Consumer(weight, halved(x), kept), (0.0,))
    best = torch.linalg.lstsq(x[:, kept].double(), (x @ weight.T).double()).solution.T
    torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-3)

    def error(w: Tensor) -> float:
        return float((x @ weight.T - x[:, kept] @ w.T).square().sum())

    assert error(found) < 0.9 * error(weight[:, kept])
    assert error(refitted(Consumer(weight, halved(x), kept), (0.1, 1.0))) <= error(weight[:, kept])


def test_channels_that_others_determine_cost_nothing() -> None:
    x, weight = data()
    x[:, 3] = 2.0 * x[:, 1] - x[:, 7]
    kept = torch.tensor([n for n in range(10) if n != 3])
    found = refitted(Consumer(weight, halved(x), kept), (1e-7,))
    torch.testing.assert_close(x[:, kept] @ found.T, x @ weight.T, rtol=1e-3, atol=1e-2)


def test_inputs_that_nobody_saw_leave_the_weights() -> None:
    _, weight = data()
    kept = torch.tensor([1, 2])
    assert torch.equal(refitted(Consumer(weight, (torch.zeros(10, 10),) * 2, kept), (0.01,)), weight[:, kept])


def test_a_singular_matrix_is_damped_until_it_can_be_solved() -> None:
    gram = torch.ones(4, 4, dtype=torch.float64)
    cross = torch.ones(2, 4, dtype=torch.float64)
    found = Normal(gram, cross).change(0.0)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found @ gram, cross, rtol=1e-3, atol=1e-3)


def test_the_end_of_a_block_takes_up_what_its_outputs_lack(tmp_path) -> None:  # type: ignore[no-untyped-def]
    x, weight = data()
    draw = torch.Generator().manual_seed(1)
    stream, other = torch.randn(200, 6, generator=draw), torch.randn(6, 10, generator=draw)
    wanted = stream + x @ other.T
    states = Activations(tmp_path / "states.bin", (1, 1, 1), torch.float32, create=True)

    def passes(name: str, weights: dict[str, Tensor]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        gives = stream + x @ weights.get(name, weight).T
        for n, part in enumerate(torch.arange(200).split(50)):
            yield n // 2, x[part][None], gives[part][None], wanted[part][None]

    io = RepairIO(FitIO({}, states, states, 1), dict, passes)  # type: ignore[arg-type]
    torch.testing.assert_close(caught_up(io, "down", {}, weight, (1e-6,)), other, rtol=1e-2, atol=1e-2)
    near = caught_up(io, "down", {}, weight, (10.0,))
    assert float((near - weight).norm()) < float((other - weight).norm())
    states.delete()


def test_a_fit_that_does_not_hold_on_the_other_half_is_left_out() -> None:
    """Inputs that have nothing to do with each other, and as few tokens as there are inputs."""
    draw = torch.Generator().manual_seed(2)
    x, weight = torch.randn(24, 20, generator=draw), torch.randn(6, 20, generator=draw)
    kept = torch.arange(10)
    assert torch.equal(refitted(Consumer(weight, halved(x), kept), (0.001,)), weight[:, kept])
