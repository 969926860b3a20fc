"""Weighted k-means in one dimension against the exact optimum by dynamic programming, and its invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.formats import kmeans


def _case(units: int = 12, n: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(units, n, generator=g), torch.rand(units, n, generator=g) ** 6


def _error(values: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    miss = (values[:, :, None] - levels[:, None, :]).abs().min(2).values
    return (miss.double().square() * weights.double()).sum(1)


def _optimum(values: Tensor, weights: Tensor, k: int) -> float:
    """Least weighted error of one row: cost[i] of the first i sorted values, over all places of the last interval."""
    order = values.argsort()
    v, h = values[order].double(), weights[order].double()
    n = len(v)
    cost = [[0.0] * (n + 1) for _ in range(n)]
    for i in range(n):
        mass = moment = square = 0.0
        for j in range(i, n):
            mass, moment, square = mass + float(h[j]), moment + float(h[j] * v[j]), square + float(h[j] * v[j] ** 2)
            cost[i][j + 1] = max(square - moment**2 / mass, 0.0) if mass > 0 else 0.0
    best = [0.0, *(cost[0][j] for j in range(1, n + 1))]
    for _ in range(k - 1):
        best = [0.0, *(min(best[i] + cost[i][j] for i in range(j)) for j in range(1, n + 1))]
    return best[n]


@pytest.mark.parametrize("k", [2, 4, 8])
def test_close_to_the_optimum_and_never_below(k: int) -> None:
    """Within 50 % for each row and 10 % on average, under weights of very different size."""
    values, weights = _case(8, 40)
    error = _error(values, weights, kmeans.fit(values, k, weights=weights))
    best = torch.tensor([_optimum(v, h, k) for v, h in zip(values, weights, strict=True)], dtype=torch.float64)
    ratio = error / best
    assert bool((ratio >= 1 - 1e-5).all())
    assert float(ratio.max()) < 1.5
    assert float(ratio.mean()) < 1.1


def test_a_step_never_raises_the_error() -> None:
    values, weights = _case()
    data = kmeans._Sorted(values.double(), weights)
    levels = torch.linspace(-3, 3, 8, dtype=torch.float64).repeat(len(values), 1)
    last = _error(values, weights, levels)
    for _ in range(12):
        levels = data.descend(levels, None, 1)
        now = _error(values, weights, levels)
        assert bool((now <= last * (1 + 1e-9)).all())
        last = now
    assert bool((_error(values, weights, kmeans.fit(values, 8, weights=weights)) < last).all())


def test_the_fixed_point_is_a_mean_of_nearest_values() -> None:
    values, weights = _case()
    levels = kmeans.fit(values, 4, weights=weights)
    index = kmeans.nearest(values, levels)
    for row in range(len(values)):
        for k in range(4):
            mine = index[row] == k
            mean = (values[row, mine].double() * weights[row, mine].double()).sum() / weights[row, mine].double().sum()
            assert float(levels[row, k]) == pytest.approx(float(mean), rel=1e-5, abs=1e-6)


def test_equal_weights_are_plain_k_means_and_zeros_count_alike() -> None:
    values, _ = _case()
    plain = kmeans.fit(values, 8)
    assert torch.equal(plain, kmeans.fit(values, 8, weights=torch.full_like(values, 2.0)))
    assert torch.equal(plain, kmeans.fit(values, 8, weights=torch.zeros_like(values)))
    assert torch.equal(plain, kmeans.fit(values, 8, weights=torch.ones(60)))


def test_few_distinct_values_are_exact() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.tensor([-3.0, 0.125, 0.25, 7.0])[torch.randint(0, 4, (5, 30), generator=g)]
    values[1] = 2.5
    levels = kmeans.fit(values, 4, weights=torch.rand(5, 30, generator=g) ** 9)
    assert torch.equal(levels.gather(1, kmeans.nearest(values, levels)), values)
    assert bool((levels.diff(dim=1) >= 0).all())


def test_a_level_of_zero_where_it_is_asked_for() -> None:
    values, weights = _case()
    values += 4.0
    zero = torch.arange(12) % 2 == 0
    levels = kmeans.fit(values, 4, weights=weights, zero=zero)
    assert torch.equal((levels == 0).any(1), zero)
    assert torch.equal(levels[~zero], kmeans.fit(values, 4, weights=weights)[~zero])


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = _case(9, 33)
    whole = kmeans.fit(values, 8, weights=weights)
    monkeypatch.setattr(kmeans, "_CHUNK", 70)
    assert torch.equal(kmeans.fit(values, 8, weights=weights), whole)
    assert torch.equal(kmeans.fit(values[3:4], 8, weights=weights[3:4]), whole[3:4])
