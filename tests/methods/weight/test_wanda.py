"""Wanda and magnitude pruning from their scores, by sorting in float64."""

import torch
from torch import Tensor

from lilliput.methods.weight import magnitude, wanda
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def _case() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(10, 40, generator=g), torch.randn(200, 40, generator=g) * torch.exp(torch.randn(40, generator=g))


def _stats(x: Tensor) -> SiteStats:
    return SiteStats(x.shape[1], x.shape[0], square=x.square().sum(0))


def _support(layer: Layer) -> Tensor:
    assert layer.support is not None
    return layer.support


def test_wanda_prunes_each_row_by_weight_times_input_norm() -> None:
    w, x = _case()
    score = w.double().abs() * x.double().norm(dim=0)
    got = _support(wanda.compress(Layer("x", w), _stats(x), Target(sparsity=0.6), wanda.Options()))
    for row in range(10):
        assert set(got[row].nonzero().flatten().tolist()) == set(score[row].argsort(descending=True)[:16].tolist())
    pattern = _support(wanda.compress(Layer("x", w), _stats(x), Target(pattern="1:4"), wanda.Options()))
    assert torch.equal(pattern.view(10, 10, 4).int().argmax(2), score.view(10, 10, 4).argmax(2))


def test_moving_scale_between_inputs_and_weights_leaves_wandas_mask() -> None:
    w, x = _case()
    factor = 2.0 ** torch.randint(-3, 4, (40,), generator=torch.Generator().manual_seed(2))
    one, other = (
        _support(wanda.compress(Layer("x", a), _stats(b), Target(sparsity=0.5), wanda.Options()))
        for a, b in ((w, x), (w / factor, x * factor))
    )
    assert torch.equal(one, other)


def test_inputs_of_equal_norm_make_wanda_magnitude_by_rows() -> None:
    w, _ = _case()
    flat = SiteStats(40, 9, square=torch.full((40,), 2.5))
    a = wanda.compress(Layer("x", w), flat, Target(sparsity=0.5), wanda.Options())
    b = magnitude.compress(Layer("x", w), flat, Target(sparsity=0.5), magnitude.Options(scope="row"))
    assert torch.equal(_support(a), _support(b))
    without = wanda.compress(
        Layer("x", w), SiteStats(40, 0, square=torch.zeros(40)), Target(sparsity=0.5), wanda.Options()
    )
    assert torch.equal(_support(without), _support(b))


def test_magnitude_prunes_the_layer_as_a_whole() -> None:
    w, x = _case()
    got = _support(magnitude.compress(Layer("x", w), _stats(x), Target(sparsity=0.3), magnitude.Options()))
    kept = set(w.double().abs().flatten().argsort(descending=True)[: 400 - 120].tolist())
    assert set(got.flatten().nonzero().flatten().tolist()) == kept
