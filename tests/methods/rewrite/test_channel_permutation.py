"""Orders of hidden channels for N:M against brute force, and what they promise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput import api
from lilliput.errors import PlanError
from lilliput.methods.rewrite.channel_permutation import kept, ordered
from lilliput.model.stored import open_model
from lilliput.progress import Quiet

Tiny = Callable[[str], Path]
RUN: dict[str, Any] = {"samples": 4, "tokens": 32, "device": "cpu", "dtype": "float32", "eval_windows": 0}


def uneven(rows: int, width: int, seed: int) -> Tensor:
    """Scores of which neighbours are alike."""
    draw = torch.Generator().manual_seed(seed)
    level = torch.exp(torch.linspace(2, -2, width))
    return torch.rand(rows, width, generator=draw) * level


def brute(score: Tensor, order: Tensor, n: int, m: int) -> float:
    total = 0.0
    for row in score[:, order].double().tolist():
        for a in range(0, len(row), m):
            total += sum(sorted(row[a : a + m])[m - n :])
    return total


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_it_keeps_more_than_the_order_as_it_is(n: int, m: int, seed: int) -> None:
    score = uneven(12, 32, seed)
    order = ordered(score, n, m, 1)
    assert sorted(order.tolist()) == list(range(32))
    assert kept(score, order, n, m) == pytest.approx(brute(score, order, n, m), rel=1e-6)
    dealt, assigned = ordered(score, n, m, 0), ordered(score, n, m, 2)
    plain = torch.arange(32)
    values = [brute(score, x, n, m) for x in (plain, dealt, order, assigned)]
    assert values[0] < values[2]
    assert values[1] <= values[2] + 1e-6
    assert values[2] <= values[3] + 1e-6


def test_one_place_is_assigned_as_the_best_of_all_ways() -> None:
    """Two groups of two, whose places are both tried in turn."""
    score = uneven(5, 4, 1)
    best = max(brute(score, torch.tensor(x), 1, 2) for x in itertools.permutations(range(4)))
    assert brute(score, ordered(score, 1, 2, 3), 1, 2) == pytest.approx(best)


def test_an_order_that_is_best_already_stays() -> None:
    score = torch.tensor([[9.0, 8.0, 0.0, 0.0, 7.0, 6.0, 0.0, 0.0]])
    assert ordered(score, 2, 4, 1).tolist() == list(range(8))


def test_a_folder_is_pruned_in_the_new_order(tiny: Tiny, tmp_path: Path) -> None:
    recipe = "steps:\n  - {method: channel-permutation}\n  - {method: ria, target: {pattern: '2:4'}}\n"
    done = api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, progress=Quiet(), **RUN)
    assert done.engine is not None
    assert not done.engine.problems
    name = "model.layers.0.mlp.down_proj.weight"
    before, after = (open_model(x).read(name).float() for x in (tiny("llama"), tmp_path / "out"))
    held = after != 0
    assert int(held.view(-1, 4).sum(1).max()) <= 2
    assert set(after[held].tolist()) <= set(before.flatten().tolist())
    assert not torch.equal(before[held], after[held])


def test_a_pattern_that_is_none_is_refused(tiny: Tiny) -> None:
    recipe = "steps:\n  - {method: channel-permutation, options: {n_of_m: x}}\n"
    with pytest.raises(PlanError, match="n_of_m"):
        api.plan(tiny("llama"), recipe=recipe, samples=2, tokens=16)
