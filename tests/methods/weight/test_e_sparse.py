"""E-Sparse from its score, with entropies counted value by value."""

import math

import pytest
import torch
from torch import Tensor

from lilliput.methods.weight import e_sparse, wanda
from lilliput.parts.layer import Layer
from lilliput.stats import bins, fold
from lilliput.stats.site import SiteStats
from lilliput.target import Target

ROWS, WIDTH = 10, 40


def _case() -> tuple[Tensor, Tensor, SiteStats]:
    """Inputs of uneven size, some of them nearly constant."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, WIDTH, generator=g) * torch.exp(torch.randn(WIDTH, generator=g))
    x[:, ::3] = 1.5 + 0.1 * torch.rand(300, x[:, ::3].shape[1], generator=g)
    x[::2, 5] = 0.0
    stats = fold.finish(fold.update(fold.init(WIDTH, ("square", "histogram")), x))
    return torch.randn(ROWS, WIDTH, generator=g), x, stats


def _entropy(x: Tensor) -> list[float]:
    found = []
    for j in range(x.shape[1]):
        counts: dict[int, int] = {}
        for value in x[:, j].abs().tolist():
            place = -40 if value == 0 else max(-40, min(23, math.floor(2 * math.log2(value))))
            counts[place] = counts.get(place, 0) + 1
        found.append(-sum(n / len(x) * math.log(n / len(x)) for n in counts.values()))
    return found


def _support(layer: Layer) -> Tensor:
    assert layer.support is not None
    return layer.support


def test_entropies_are_those_of_counted_values() -> None:
    _, x, stats = _case()
    found = bins.entropy(stats.need("histogram"))
    assert found.tolist() == pytest.approx(_entropy(x), abs=1e-5)
    assert float(found[0]) < 0.1 < float(found[1])
    assert bool((bins.entropy(torch.zeros(3, bins.COUNT)) == 0).all())


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_prunes_each_row_by_size_and_entropy(alpha: float) -> None:
    w, x, stats = _case()
    norm = x.double().norm(dim=0)
    score = w.double().abs() * (norm / norm.mean() + alpha * torch.tensor(_entropy(x), dtype=torch.float64))
    got = _support(e_sparse.compress(Layer("x", w), stats, Target(sparsity=0.6), e_sparse.Options(alpha=alpha)))
    for row in range(ROWS):
        assert set(got[row].nonzero().flatten().tolist()) == set(score[row].argsort(descending=True)[:16].tolist())


def test_without_entropy_it_is_wanda() -> None:
    w, _, stats = _case()
    for target in (Target(sparsity=0.5), Target(pattern="2:4")):
        ours = e_sparse.compress(Layer("x", w), stats, target, e_sparse.Options(alpha=0.0))
        assert torch.equal(_support(ours), _support(wanda.compress(Layer("x", w), stats, target, wanda.Options())))


def test_histograms_add_up_and_move_with_scale() -> None:
    _, x, stats = _case()
    halves = [fold.update(fold.init(WIDTH, ("histogram",)), part) for part in (x[:100], x[100:])]
    assert torch.equal(fold.merge(*halves).need("histogram"), stats.need("histogram"))
    factor = 2.0 ** torch.randint(-3, 4, (WIDTH,), generator=torch.Generator().manual_seed(1))
    moved = fold.update(fold.init(WIDTH, ("histogram",)), x * factor)
    assert torch.equal(stats.scaled(factor).need("histogram"), moved.need("histogram"))
