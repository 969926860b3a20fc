"""BESA's closed form: errors from their definition, the division against trying all rates."""

import itertools
import math

import pytest
import torch

from lilliput.algebra import masks
from lilliput.methods.allocate import besa
from lilliput.methods.weight import wanda
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target
from lilliput.verbs.scores import Share

SIZES = {"a": (6, 20), "b": (5, 20), "c": (4, 30)}
WEIGHTS = sum(math.prod(s) for s in SIZES.values())


def _budget(sparsity: float) -> dict[str, Share]:
    return {n: Share(0, s, Target(sparsity=sparsity)) for n, s in SIZES.items()}


def _divided(scores: dict[str, tuple[float, ...]], sparsity: float, options: besa.Options) -> dict[str, float]:
    return {n: float(t.sparsity or 0.0) for n, t in besa.allocate(scores, _budget(sparsity), options).items()}


def test_errors_are_those_of_wanda_at_each_rate() -> None:
    """What the step that prunes would leave if it got this very rate; to 1e-4."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(7, 40, generator=g), torch.randn(90, 40, generator=g) @ torch.randn(40, 40, generator=g)
    stats = SiteStats(40, 90, gram=x.T @ x, square=x.square().sum(0))
    found = besa.errors(w, stats.need("gram"), 10)
    for k in range(11):
        pruned = wanda.compress(Layer("x", w), stats, Target(sparsity=k / 10), wanda.Options())
        lost = ((w - pruned.decode()).double() @ x.double().T).square().sum()
        assert float(found[k]) == pytest.approx(float(lost), rel=1e-4, abs=1e-6)
    assert masks.largest(w.abs(), 3).sum() == 21


def test_no_other_choice_of_rates_has_a_smaller_summed_error() -> None:
    """Convex curves with 11 rates: all triples whose mean is at least the recipe's are tried."""
    scores = {
        n: tuple((k / 10) ** power * unit for k in range(11))
        for n, (power, unit) in {"a": (2.0, 1.0), "b": (3.0, 2.0), "c": (4.0, 0.5)}.items()
    }
    sizes = [math.prod(s) for s in SIZES.values()]

    def cost(rates: tuple[float, ...]) -> float:
        total = 0.0
        for n, rate, size in zip(SIZES, rates, sizes, strict=True):
            first = min(int(rate * 10), 9)
            part = rate * 10 - first
            total += size * (scores[n][first] + part * (scores[n][first + 1] - scores[n][first]))
        return total

    got = tuple(_divided(scores, 0.5, besa.Options(rates=10, spread=1.0)).values())
    assert sum(p * n for p, n in zip(got, sizes, strict=True)) == pytest.approx(0.5 * WEIGHTS, rel=1e-12)
    for tried in itertools.product([k / 10 for k in range(11)], repeat=3):
        if sum(p * n for p, n in zip(tried, sizes, strict=True)) >= 0.5 * WEIGHTS:
            assert cost(got) <= cost(tried) + 1e-9


def test_rates_stay_within_the_spread_and_the_mean_is_exact() -> None:
    g = torch.Generator().manual_seed(3)
    for sparsity in (0.03, 0.5, 0.9):
        scores = {n: tuple(torch.rand(21, generator=g).sort().values.tolist()) for n in SIZES}
        got = _divided(scores, sparsity, besa.Options(rates=20, spread=0.1))
        assert sum(got[n] * math.prod(s) for n, s in SIZES.items()) == pytest.approx(sparsity * WEIGHTS, rel=1e-12)
        assert all(abs(p - sparsity) <= 0.1 + 1e-12 for p in got.values())


def test_equal_curves_give_equal_sparsities() -> None:
    curve = tuple((k / 100) ** 2 for k in range(101))
    got = _divided(dict.fromkeys(SIZES, curve), 0.437, besa.Options())
    assert len(set(got.values())) == 1
    assert got["a"] == pytest.approx(0.437, rel=1e-12)
    assert set(_divided(dict.fromkeys(SIZES, (0.0,) * 101), 0.5, besa.Options()).values()) == {0.5}
