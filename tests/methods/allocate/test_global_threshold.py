"""The global threshold against sorting all scores of a model together, in float64."""

import math

import pytest
import torch

from lilliput.anatomy.model import Block, Linear, Site
from lilliput.methods.allocate import global_threshold
from lilliput.stats.site import SiteStats
from lilliput.target import Target
from lilliput.verbs.scores import Share
from lilliput.verbs.view import BlockIO, BlockView

SIZES = {"a": (60, 80), "b": (50, 80), "c": (40, 100)}
WEIGHTS = sum(math.prod(s) for s in SIZES.values())


def _case() -> tuple[BlockView, BlockIO, dict[str, torch.Tensor]]:
    """Weights of three kinds of tail: normal, uniform, and cubes of normal ones."""
    g = torch.Generator().manual_seed(0)
    linears = tuple(Linear(n, "up", n, *s) for n, s in SIZES.items())
    sites = tuple(Site(n, s[1], (n,), k) for k, (n, s) in enumerate(SIZES.items()))
    square = {n: torch.rand(s[1], generator=g) for n, s in SIZES.items()}
    normal = {n: torch.randn(*s, generator=g) for n, s in SIZES.items()}
    weights = {"a": normal["a"], "b": torch.rand(SIZES["b"], generator=g) + 0.5, "c": normal["c"] ** 3 * 20}
    scores = {n: w.double().abs() * (square[n].double() / 9).sqrt() for n, w in weights.items()}
    stats = {n: SiteStats(SIZES[n][1], 9, square=x) for n, x in square.items()}
    return BlockView(Block(linears, sites, (), ()), weights), BlockIO(stats), scores


def _divided(sparsity: float, options: global_threshold.Options) -> dict[str, float]:
    view, io, _ = _case()
    budget = {n: Share(0, s, Target(sparsity=sparsity)) for n, s in SIZES.items()}
    found = global_threshold.allocate(global_threshold.score(view, io, options), budget, options)
    return {n: float(t.sparsity or 0.0) for n, t in found.items()}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8])
def test_equals_sorting_everything(normalize: bool, sparsity: float) -> None:
    """To 1 % of a linear's weights, which is what bins cost; the mean to float64."""
    _, _, scores = _case()
    if normalize:
        scores = {n: s / s.mean() for n, s in scores.items()}
    threshold = torch.cat([s.flatten() for s in scores.values()]).sort().values[round(sparsity * WEIGHTS)]
    got = _divided(sparsity, global_threshold.Options(normalize=normalize, most=1.0))
    for name, s in scores.items():
        assert got[name] == pytest.approx(float((s < threshold).double().mean()), abs=0.01)
    assert sum(got[n] * math.prod(s) for n, s in SIZES.items()) == pytest.approx(sparsity * WEIGHTS, rel=1e-12)


def test_no_linear_gets_more_than_the_most() -> None:
    got = _divided(0.5, global_threshold.Options(most=0.55))
    assert max(got.values()) == 0.55
    assert sum(got[n] * math.prod(s) for n, s in SIZES.items()) == pytest.approx(0.5 * WEIGHTS, rel=1e-12)
    assert "most" in str(global_threshold.refuse(Target(sparsity=0.6), global_threshold.Options(most=0.55)))


def test_the_ends() -> None:
    assert set(_divided(0.0, global_threshold.Options()).values()) == {0.0}
    assert min(_divided(1.0, global_threshold.Options(most=1.0)).values()) == pytest.approx(1.0, rel=1e-12)
