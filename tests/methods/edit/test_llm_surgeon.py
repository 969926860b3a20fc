"""Kronecker-factored costs against the whole Fisher matrix, and what they become for simple curvature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.methods.edit import llm_surgeon
from lilliput.verbs.edits import EditIO, Sizes


def damped(matrix: Tensor, share: float) -> Tensor:
    return matrix + share * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def spd(n: int, seed: int) -> Tensor:
    x = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed)).double()
    return x.T @ x / (3 * n)


def test_a_units_cost_is_that_of_its_rows_and_columns(scored: Any) -> None:
    slopes = {x.name: spd(x.out_features, n).float() for n, x in enumerate(scored.block.linears)}
    got = llm_surgeon.score(scored.view, EditIO(scored.stats("gram"), {}, {}, outputs=slopes), llm_surgeon.Options())

    def row(name: str, i: int) -> float:
        w, a = scored.weights[name][i], scored.gram(scored.block.linear(name).site) / 50
        inverse = torch.linalg.inv(damped(slopes[name].double(), 0.01))
        return 0.5 * float(w @ a @ w) / float(inverse[i, i])

    def column(name: str, j: int) -> float:
        w, a = scored.weights[name][:, j], scored.gram(scored.block.linear(name).site) / 50
        return 0.5 * float(w @ slopes[name].double() @ w) / float(torch.linalg.inv(damped(a, 0.01))[j, j])

    for j in (0, 17, 39):
        expected = row("mlp.gate_proj", j) + row("mlp.up_proj", j) + column("mlp.down_proj", j)
        assert got["channels.0"][j] == pytest.approx(expected, rel=1e-3)
    for n in range(2):
        own, queries = range(6 * n, 6 * n + 6), range(12 * n, 12 * n + 12)
        expected = sum(row("self_attn.k_proj", i) + row("self_attn.v_proj", i) for i in own)
        expected += sum(row("self_attn.q_proj", i) + column("self_attn.o_proj", i) for i in queries)
        assert got["heads"][n] == pytest.approx(expected, rel=1e-3)


def test_the_cost_of_a_column_is_the_least_quadratic_loss_without_it() -> None:
    """With F = G (x) A the best change that takes column j to 0, from the normal equations of all weights."""
    g, a, w = spd(3, 1), spd(4, 2), torch.randn(3, 4, generator=torch.Generator().manual_seed(3)).double()
    whole = torch.kron(g, a)  # rows of W one after the other
    got = llm_surgeon.cost(w, g, a, torch.linalg.inv(a).diagonal())
    for j in range(4):
        gone = torch.tensor([i * 4 + j for i in range(3)])
        rest = torch.tensor([n for n in range(12) if n % 4 != j])
        d = torch.zeros(12, dtype=torch.float64)
        d[gone] = -w[:, j]
        d[rest] = -torch.linalg.solve(whole[rest][:, rest], whole[rest][:, gone] @ d[gone])
        assert float(got[j]) == pytest.approx(0.5 * float(d @ whole @ d), rel=1e-9)


def test_without_curvature_it_is_magnitude_and_without_that_of_outputs_obs() -> None:
    w, a, eye = torch.randn(3, 5).double(), spd(5, 4), torch.eye(5, dtype=torch.float64)
    inverse = torch.linalg.inv(a).diagonal()
    torch.testing.assert_close(
        llm_surgeon.cost(w, torch.eye(3).double(), a, inverse), 0.5 * w.square().sum(0) / inverse
    )
    torch.testing.assert_close(llm_surgeon.cost(w, torch.eye(3).double(), eye, eye.diagonal()), 0.5 * w.square().sum(0))
    assert not bool(llm_surgeon.cost(w, torch.eye(3).double(), 0 * a, inverse).any())


def io_of(scored: Any, sizes: Sizes | None = None) -> EditIO:
    slopes = {x.name: spd(x.out_features, n).float() for n, x in enumerate(scored.block.linears)}
    return EditIO(scored.stats("gram"), {}, {}, outputs=slopes, sizes=sizes)


def slow_cost(scored: Any, io: EditIO, weights: dict[str, Tensor], gone: set[int], j: int) -> float:
    """Of channel j once those of `gone` have left gate, up and down: the inverse is that of what is left."""
    rest = [n for n in range(40) if n not in gone]
    place = rest.index(j)
    total = 0.0
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        a = scored.gram(scored.block.linear(name).site) / 50
        g, w = io.outputs[name].double(), weights[name]
        if name == "mlp.down_proj":
            inverse, energy = torch.linalg.inv(damped(a, 0.01)[rest][:, rest]), w[:, j] @ g @ w[:, j]
        else:
            inverse, energy = torch.linalg.inv(damped(g, 0.01)[rest][:, rest]), w[j] @ a @ w[j]
        total += 0.5 * float(energy) / float(inverse[place, place])
    return total


def removed_one_by_one(scored: Any, io: EditIO, order: list[int]) -> dict[str, Tensor]:
    """The weights after the rows and columns of channels left, each with the update of one row or column."""
    weights = {}
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        down = name == "mlp.down_proj"
        along = scored.gram(scored.block.linear(name).site) / 50 if down else io.outputs[name].double()
        w = scored.weights[name].clone() if down else scored.weights[name].T.clone()
        inverse = torch.linalg.inv(damped(along, 0.01))
        for j in order:
            w -= torch.outer(w[:, j], inverse[j]) / inverse[j, j]
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            w[:, j] = 0.0
        weights[name] = w if down else w.T
    return weights


def test_each_shot_scores_what_the_ones_before_have_left(scored: Any) -> None:
    io = io_of(scored, Sizes(1, 28))
    got = llm_surgeon.score(scored.view, io, llm_surgeon.Options(shots=3))["channels.0"]
    order: list[int] = []
    weights = scored.weights
    for shot in (1, 2, 3):
        costs = {j: slow_cost(scored, io, weights, set(order), j) for j in range(40) if j not in order}
        out = sorted(costs, key=lambda j: costs[j])[: 4 * shot - len(order)]
        highest = max((got[j] for j in order), default=0.0)
        for j in costs if shot == 3 else out:
            assert got[j] == pytest.approx(max(costs[j], highest), rel=1e-3)
        order += out
        weights = {**scored.weights, **removed_one_by_one(scored, io, order)}
    assert sorted(range(40), key=lambda j: got[j])[:12] == order
    once = llm_surgeon.score(scored.view, io, llm_surgeon.Options())["channels.0"]
    assert sorted(range(40), key=lambda j: once[j])[:12] != order


def test_the_update_is_that_of_single_rows_and_columns_one_after_the_other(scored: Any) -> None:
    io, gone = io_of(scored), [3, 30, 17, 8]
    stays = tuple(n for n in range(40) if n not in gone)
    got = llm_surgeon.update(scored.view, io, {"channels.0": stays, "heads": (1,)}, llm_surgeon.Options())
    slow = removed_one_by_one(scored, io, gone)
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        torch.testing.assert_close(got[name].double(), slow[name][list(stays)], rtol=1e-4, atol=1e-5)
        assert not bool(slow[name][gone].any())
    torch.testing.assert_close(
        got["mlp.down_proj"].double(), slow["mlp.down_proj"][:, list(stays)], rtol=1e-4, atol=1e-5
    )
    assert got["self_attn.o_proj"].shape[1] == scored.weights["self_attn.o_proj"].shape[1] // 2
    assert got["self_attn.q_proj"].shape[0] == scored.weights["self_attn.q_proj"].shape[0] // 2


def test_rows_that_stay_make_up_for_the_others_as_the_whole_fisher_matrix_says() -> None:
    """F = G (x) A; rows 1 and 2 become 0, and all other weights minimise the quadratic loss."""
    g, a, w = spd(4, 1), spd(3, 2), torch.randn(4, 3, generator=torch.Generator().manual_seed(3)).double()
    whole = torch.kron(g, a)
    gone, rest = list(range(3, 9)), [0, 1, 2, 9, 10, 11]
    d = torch.linalg.solve(whole[rest][:, rest], whole[rest][:, gone] @ w.flatten()[gone])
    got = llm_surgeon.made_up(w.T, g, torch.tensor([True, False, False, True])).T
    torch.testing.assert_close(got.double(), (w.flatten()[rest] + d).view(2, 3), rtol=1e-5, atol=1e-6)
