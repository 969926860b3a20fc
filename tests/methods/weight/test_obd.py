"""Scores from curvature and gradients, by sorting in float64: obd, taylor-first-order, gblm-pruner."""

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.weight import gblm_pruner, obd, taylor_first_order, wanda
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target

ROWS, WIDTH = 10, 40


def _case() -> tuple[Tensor, Tensor, Tensor, SiteStats]:
    """Weight, inputs, gradients of 6 samples [6, out, in]."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, WIDTH, generator=g) * torch.exp(torch.randn(WIDTH, generator=g))
    slopes = torch.randn(6, ROWS, WIDTH, generator=g) * 1e-3 * torch.exp(torch.randn(ROWS, WIDTH, generator=g))
    return torch.randn(ROWS, WIDTH, generator=g), x, slopes, SiteStats(WIDTH, 200, square=x.square().sum(0))


def _layer(w: Tensor, slopes: Tensor) -> Layer:
    return Layer("x", w, fisher=slopes.square().mean(0))


def _support(layer: Layer) -> Tensor:
    assert layer.support is not None
    return layer.support


def _best(score: Tensor, keep: int) -> set[int]:
    return set(score.flatten().argsort(descending=True)[:keep].tolist())


def _kept(layer: Layer) -> set[int]:
    return set(_support(layer).flatten().nonzero().flatten().tolist())


def test_obd_takes_half_the_curvature_times_the_square() -> None:
    w, x, slopes, stats = _case()
    for curvature, diagonal in (("fisher", slopes.double().square().mean(0)), ("gram", x.double().square().mean(0))):
        score = 0.5 * diagonal * w.double().square()
        options = obd.Options.model_validate({"curvature": curvature})
        assert _kept(obd.compress(_layer(w, slopes), stats, Target(sparsity=0.6), options)) == _best(score, 160)
    rows = obd.compress(_layer(w, slopes), stats, Target(sparsity=0.5), obd.Options(curvature="gram", scope="row"))
    same = wanda.compress(Layer("x", w), stats, Target(sparsity=0.5), wanda.Options())
    assert torch.equal(_support(rows), _support(same))


def test_taylor_takes_the_change_of_each_samples_loss() -> None:
    """For a loss linear in the weights, removing w changes sample n's loss by -w g_n exactly."""
    w, _, slopes, stats = _case()
    changes = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    for i in range(ROWS):
        for j in range(WIDTH):
            without = w.double().clone()
            without[i, j] = 0.0
            change = ((without - w.double()) * slopes.double()).sum((1, 2))
            changes[i, j] = change.square().mean().sqrt()
    layer = taylor_first_order.compress(_layer(w, slopes), stats, Target(sparsity=0.6), taylor_first_order.Options())
    assert _kept(layer) == _best(changes, 160)


@pytest.mark.parametrize("inputs", [True, False])
def test_gblm_adds_the_norm_of_gradients(inputs: bool) -> None:
    w, x, slopes, stats = _case()
    options = gblm_pruner.Options(scope="layer", alpha=100.0, inputs=inputs)
    score = 100.0 * w.double().abs() * slopes.double().square().mean(0).sqrt()
    if inputs:
        score = score + w.double().abs() * x.double().square().mean(0).sqrt()
    assert _kept(gblm_pruner.compress(_layer(w, slopes), stats, Target(sparsity=0.6), options)) == _best(score, 160)
    assert set(gblm_pruner.reads(options)) == ({"square", "fisher"} if inputs else {"fisher"})


def test_gblm_without_gradients_is_wanda() -> None:
    w, _, _, stats = _case()
    options = gblm_pruner.Options(alpha=0.0)
    assert gblm_pruner.reads(options) == ("square",)
    for target in (Target(sparsity=0.5), Target(pattern="2:4")):
        ours = gblm_pruner.compress(Layer("x", w), stats, target, options)
        assert torch.equal(_support(ours), _support(wanda.compress(Layer("x", w), stats, target, wanda.Options())))


def test_gblm_with_neither_term_is_refused() -> None:
    w, _, _, stats = _case()
    with pytest.raises(PlanError, match="neither"):
        gblm_pruner.compress(Layer("x", w), stats, Target(sparsity=0.5), gblm_pruner.Options(alpha=0.0, inputs=False))
