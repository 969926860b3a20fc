"""RIA from its score, weight by weight in float64."""

import torch
from torch import Tensor

from lilliput.methods.weight import magnitude, ria
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def _case() -> tuple[Tensor, Tensor, SiteStats]:
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(10, 40, generator=g), torch.randn(200, 40, generator=g) * torch.exp(torch.randn(40, generator=g))
    return w, x, SiteStats(40, 200, square=x.square().sum(0))


def _support(layer: Layer) -> Tensor:
    assert layer.support is not None
    return layer.support


def _score(w: Tensor, x: Tensor, a: float) -> Tensor:
    size = w.double().abs()
    score = torch.zeros_like(size)
    for i in range(len(w)):
        for j in range(w.shape[1]):
            share = size[i, j] / size[:, j].sum() + size[i, j] / size[i].sum()
            score[i, j] = share * x[:, j].double().norm() ** a
    return score


def test_prunes_each_row_by_relative_importance() -> None:
    w, x, stats = _case()
    for a in (0.0, 0.5, 1.0):
        score = _score(w, x, a)
        got = _support(ria.compress(Layer("x", w), stats, Target(sparsity=0.6), ria.Options(exponent=a)))
        for row in range(10):
            assert set(got[row].nonzero().flatten().tolist()) == set(score[row].argsort(descending=True)[:16].tolist())
        pattern = _support(ria.compress(Layer("x", w), stats, Target(pattern="1:4"), ria.Options(exponent=a)))
        assert torch.equal(pattern.view(10, 10, 4).int().argmax(2), score.view(10, 10, 4).argmax(2))


def test_uniform_weights_without_inputs_are_all_equal() -> None:
    """Ties are decided by place, as in every method."""
    w = torch.where(torch.rand(8, 24, generator=torch.Generator().manual_seed(1)) < 0.5, -0.3, 0.3)
    stats = SiteStats(24, 5, square=torch.rand(24, generator=torch.Generator().manual_seed(2)))
    got = _support(ria.compress(Layer("x", w), stats, Target(sparsity=0.5), ria.Options(exponent=0.0)))
    assert bool(got[:, :12].all())
    assert not bool(got[:, 12:].any())


def test_a_weak_output_keeps_more_than_by_magnitude() -> None:
    w, _, stats = _case()
    w = w.clone()
    w[0] *= 1e-3
    target = Target(sparsity=0.2)
    ours = _support(ria.compress(Layer("x", w), stats, target, ria.Options(scope="layer", exponent=0.0)))
    plain = _support(magnitude.compress(Layer("x", w), stats, target, magnitude.Options()))
    assert int(plain[0].sum()) == 0
    assert int(ours[0].sum()) > 5
