"""FlatQuant's transform: its equations, that it is exact, and what it is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor

import lilliput  # noqa: F401 - registers the layout with transformers
from lilliput import api
from lilliput.methods.weight import flatquant, rtn
from lilliput.parts.flat import Flat
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.parts.layer import Layer
from lilliput.progress import Quiet
from lilliput.runtime.inputs import Rounding
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.target import Target

Tiny = Callable[[str], Path]
WIDTH, P, Q = 48, 6, 8


def case() -> tuple[Tensor, Tensor, SiteStats]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, WIDTH, generator=g) * torch.exp(torch.randn(WIDTH, generator=g))
    x[:, 11] *= 20
    w = torch.randn(32, WIDTH, generator=g) * 0.1
    return x, w, fold.finish(fold.update(fold.init(WIDTH, ("gram",)), x))


def made(damping: float = 0.01) -> tuple[Tensor, Tensor, Layer, Flat]:
    x, w, stats = case()
    layer = flatquant.compress(Layer("x", w), stats, Target(), flatquant.Options(damping=damping))
    (transform,) = layer.inputs
    assert isinstance(transform, Flat)
    return x, w, layer, transform


def test_the_layer_is_what_it_was_and_the_transform_a_kronecker_product() -> None:
    x, w, layer, t = made()
    assert (t.left.shape, t.right.shape) == ((P, P), (Q, Q))
    whole = torch.kron(t.left.double(), t.right.double())
    wide = x.double()
    torch.testing.assert_close(t.apply(wide), wide @ whole.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(t.undo(t.apply(wide)), wide, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(t.undo_adjoint(t.adjoint(wide)), wide, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(t.adjoint(wide), wide @ whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        layer.rest().double() @ t.apply(wide).T, w.double() @ wide.T, rtol=0, atol=1e-4 * float((w @ x.T).abs().max())
    )


def test_inputs_and_weights_have_the_same_second_moments_in_each_factor() -> None:
    """LA A LAT = LA^-T C LA^-1, traced in loops."""
    x, w, _, t = made(damping=1e-9)
    for factor, axis in ((t.left.double(), 0), (t.right.double(), 1)):
        moments = []
        for rows in (x.double(), w.double()):
            size = (P, Q)[axis]
            traced = torch.zeros(size, size, dtype=torch.float64)
            for row in rows:
                grid = row.view(P, Q) if axis == 0 else row.view(P, Q).T
                for column in grid.T:
                    traced += torch.outer(column, column)
            moments.append(traced / traced.diagonal().mean())
        inverse = torch.linalg.inv(factor)
        torch.testing.assert_close(factor @ moments[0] @ factor.T, inverse.T @ moments[1] @ inverse, rtol=0, atol=1e-4)


def test_rounding_costs_less_in_between() -> None:
    """Weights and inputs to 4 bits."""
    x, w, layer, _ = made()
    target = Target.model_validate({"bits": 4, "group_size": "channel", "scale_dtype": "float32"})
    grid, exact = InputGrid(UniformInput(4)), w @ x.T

    def lost(start: Layer) -> float:
        done = rtn.compress(start, SiteStats(WIDTH, 0), target, rtn.Options(search="minmax"))
        return float((done.decode() @ Rounding(grid, start.inputs).of(x).T - exact).norm() / exact.norm())

    assert lost(layer) < 0.7 * lost(Layer("x", w))


@pytest.mark.slow
def test_a_folder_holds_it(tiny: Tiny, tmp_path: Path) -> None:
    recipe = "export: lilliput\nsteps:\n  - {method: flatquant}\n  - {method: act-static-dynamic, target: {bits: 8}}\n"
    api.compress(tiny("qwen2"), tmp_path / "out", recipe=recipe, samples=4, tokens=32, eval_windows=0, progress=Quiet())
    ids = torch.arange(2, 34).view(1, -1)
    with torch.no_grad():
        ours, theirs = (
            tf.AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32)(ids).logits
            for x in (tmp_path / "out", tiny("qwen2"))
        )
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.05
