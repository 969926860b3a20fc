"""Exactly K heads: the relaxed draw, and the subset that it finds against all subsets."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from lilliput.errors import PlanError
from lilliput.methods.edit import dsp
from lilliput.verbs.edits import EditIO, Units, highest


def test_a_relaxed_draw_is_a_sum_of_softmaxes_and_a_subset_when_cold() -> None:
    r = torch.tensor([[0.3, -1.0, 2.0, 0.9]], dtype=torch.float64)
    z = dsp.relaxed(r, 2, 0.5)
    p = torch.exp(r / 0.5) / torch.exp(r / 0.5).sum()
    second = torch.exp((r + torch.log(1 - p)) / 0.5)
    torch.testing.assert_close(z, p + second / second.sum())
    assert float(dsp.relaxed(torch.randn(5, 7).double(), 3, 1.0).sum(1).sub(3).abs().max()) < 1e-9
    assert dsp.relaxed(r, 2, 1e-2).round().tolist() == [[0.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize("seed", range(4))
def test_the_heads_that_stay_are_near_the_best_subset(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    slopes = torch.randn(20, 3, generator=draw).double() @ torch.randn(3, 8, generator=draw).double()
    slopes[:, 1] = slopes[:, 0] * 1.01  # alone cheap enough, together not
    first, second = slopes.mean(0), slopes.T @ slopes / 20

    def loss(kept: Any) -> float:
        gone = torch.full((8,), -1.0, dtype=torch.float64)
        gone[list(kept)] = 0.0
        return float(first @ gone + 0.5 * gone @ second @ gone)

    every = sorted((loss(x), x) for x in combinations(range(8), 4))
    w = dsp.importances(slopes, 4, 300, 0)
    found = loss(highest(w.tolist(), 4))
    assert found <= every[3][0] + 1e-9
    assert torch.equal(w, dsp.importances(slopes, 4, 300, 0))


def test_heads_without_slopes_and_models_without_heads(scored: Any) -> None:
    assert dsp.score(scored.view, EditIO({}, {}, {}), dsp.Options()) == {}
    gates = {"heads": torch.zeros(3, 2, dtype=torch.float64)}
    got = dsp.score(scored.view, EditIO({}, {}, {}, gates=gates), dsp.Options(steps=5))["heads"]
    assert all(x == x for x in got)
    with pytest.raises(PlanError, match="could not be told apart"):
        dsp.sizes([Units((8,), 0, 1, 1, 1)], dsp.Options())
