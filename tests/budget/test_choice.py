"""The choice under a budget, against trying all choices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.budget import choice
from lilliput.budget.choice import Choice, Item, Option, choose, largest, smallest

options = st.lists(st.tuples(st.integers(0, 30), st.floats(0, 10, width=32)), min_size=1, max_size=4)


def items(rows: Sequence[Sequence[tuple[int, float]]]) -> list[Item]:
    return [Item(f"{n}", tuple(Option(j, b, x) for j, (b, x) in enumerate(row))) for n, row in enumerate(rows)]


def brute(found: Sequence[Item], budget: int) -> float | None:
    totals = [
        math.fsum(x.loss for x in picks)
        for picks in itertools.product(*(x.options for x in found))
        if sum(x.bytes for x in picks) <= budget
    ]
    return min(totals, default=None)


def many(count: int, width: int, seed: int = 0) -> list[Item]:
    """Linears of several sizes whose loss falls fourfold with each bit."""
    random = np.random.default_rng(seed)
    made = []
    for n in range(count):
        weights = int(random.integers(1, 60)) * 4096
        scale = float(random.lognormal()) * weights
        sizes = [weights * (16 + 5 * j) // 64 + int(random.integers(0, 64)) for j in range(width)]
        made.append(Item(f"{n}", tuple(Option(j, b, scale * 4.0 ** (-8 * b / weights)) for j, b in enumerate(sizes))))
    return made


@settings(max_examples=200, deadline=None)
@given(st.lists(options, min_size=1, max_size=4), st.integers(0, 100))
def test_the_table_finds_the_best_of_all_choices(rows: list[list[tuple[int, float]]], budget: int) -> None:
    found = choose(items(rows), budget)
    best = brute(items(rows), budget)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert found.bytes <= budget
        assert found.loss == pytest.approx(best, abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.lists(options, min_size=1, max_size=4), st.integers(0, 100))
def test_the_path_keeps_to_the_budget_and_misses_less_than_one_step(
    rows: list[list[tuple[int, float]]], budget: int
) -> None:
    had, choice.TABLE = choice.TABLE, 0
    try:
        found = choose(items(rows), budget)
    finally:
        choice.TABLE = had
    best = brute(items(rows), budget)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert found.bytes <= budget
        spread = max(max(x for _, x in row) - min(x for _, x in row) for row in rows)
        assert best - 1e-6 <= found.loss <= best + spread + 1e-6


def test_the_path_comes_close_to_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    made = many(40, 6)
    made = [Item(x.name, tuple(Option(o.key, o.bytes // 4096, o.loss) for o in x.options)) for x in made]
    budget = (smallest(made).bytes + largest(made).bytes) // 2
    exact = choose(made, budget)
    monkeypatch.setattr(choice, "TABLE", 0)
    near = choose(made, budget)
    assert exact is not None
    assert near is not None
    assert exact.loss <= near.loss <= 1.01 * exact.loss


def test_ten_thousand_linears_fill_the_budget_and_repeat() -> None:
    made = many(10_000, 12)
    budget = (smallest(made).bytes * 2 + largest(made).bytes) // 3
    found = choose(made, budget)
    assert found is not None
    assert 0.9999 * budget < found.bytes <= budget
    assert choose(made, budget) == found


def test_work_grows_no_faster_than_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in options looked at along hulls and passes of repair, not in seconds."""

    def work(count: int) -> int:
        looked = 0
        hull, trade = choice._hull, choice._trade

        def counted_hull(sizes: object, losses: object, start: int) -> list[int]:
            nonlocal looked
            looked += len(sizes)  # type: ignore[arg-type]
            return hull(sizes, losses, start)  # type: ignore[arg-type]

        def counted_trade(*given: object) -> object:
            nonlocal looked
            looked += count
            return trade(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(choice, "_hull", counted_hull)
        monkeypatch.setattr(choice, "_trade", counted_trade)
        made = many(count, 12)
        choose(made, (smallest(made).bytes + largest(made).bytes) // 2)
        monkeypatch.undo()
        return looked

    assert work(2000) <= 3 * work(1000)


def test_more_bytes_never_lose_more() -> None:
    made = many(12, 5, seed=3)
    made = [Item(x.name, tuple(Option(o.key, o.bytes // 1024, o.loss) for o in x.options)) for x in made]
    low, high = smallest(made).bytes, largest(made).bytes
    losses = [found.loss for b in range(low, high + 1, 7) if (found := choose(made, b)) is not None]
    assert losses == sorted(losses, reverse=True)


def test_ends_of_the_range() -> None:
    made = items([[(4, 1.0), (2, 3.0)], [(5, 0.0), (1, 0.5)]])
    assert choose(made, 2) is None
    assert choose(made, 3) == Choice((1, 1), 3, 3.5) == smallest(made)
    assert choose(made, 1000) == Choice((0, 0), 9, 1.0) == largest(made)


def test_an_item_without_a_finite_loss_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="a has no options"):
        choose([Item("a", ())], 1)
    with pytest.raises(ValueError, match="not finite"):
        choose([Item("a", (Option(0, 1, float("nan")),))], 1)
