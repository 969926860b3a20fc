"""Kronecker-factored costs against the whole Fisher matrix, and what they become for simple curvature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.methods.edit import llm_surgeon
from lilliput.verbs.edits import EditIO


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
