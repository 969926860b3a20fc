"""ISC against its equations, column by column in float64."""

import pytest
import torch
from torch import Tensor

from lilliput.methods.weight import isc, sparsegpt
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target

ROWS, WIDTH = 12, 48


def _case(seed: int = 0) -> tuple[Tensor, SiteStats]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=g) * torch.exp(torch.randn(WIDTH, generator=g))
    x = torch.randn(300, WIDTH, generator=g) @ mix / WIDTH**0.5
    return torch.randn(ROWS, WIDTH, generator=g) * 0.05, SiteStats(WIDTH, 300, gram=x.T @ x)


def _support(layer: Layer) -> Tensor:
    assert layer.support is not None
    return layer.support


def _reference(w: Tensor, gram: Tensor, block: int, leave: int) -> tuple[Tensor, Tensor]:
    """Per row and block, `leave` zeros of least w^2 / [H^-1]_jj + w^2 H_jj; GPTQ's update."""
    h = gram.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    u = torch.linalg.cholesky(inverse, upper=True)
    work, kept = w.double().clone(), torch.ones(w.shape, dtype=torch.bool)
    for j in range(WIDTH):
        if j % block == 0:
            part = work[:, j : j + block].square()
            score = part / inverse.diagonal()[j : j + block] + part * h.diagonal()[j : j + block]
            for row in range(ROWS):
                kept[row, j + score[row].argsort(stable=True)[:leave]] = False
        error = torch.where(kept[:, j], 0.0, work[:, j]) / u[j, j]
        work[:, j:] -= error[:, None] * u[j, j:]
    return kept, work * kept


@pytest.mark.parametrize(("target", "block", "leave"), [({"sparsity": 0.5}, 16, 8), ({"pattern": "2:4"}, 4, 2)])
def test_equals_the_printed_algorithm(target: dict[str, object], block: int, leave: int) -> None:
    """The same zeros, and values to 1e-4 of the largest."""
    w, stats = _case()
    options = isc.Options(scope="row", block=16, shrinkage=0.0)
    layer = isc.compress(Layer("x", w), stats, Target.model_validate(target), options)
    kept, values = _reference(w, stats.need("gram"), block, leave)
    assert torch.equal(_support(layer), kept)
    torch.testing.assert_close(layer.decode().double(), values, rtol=0, atol=1e-4 * float(values.abs().max()))


def test_it_is_another_choice_than_sparsegpts() -> None:
    w, stats = _case()
    ours = isc.compress(Layer("x", w), stats, Target(sparsity=0.5), isc.Options())
    theirs = sparsegpt.compress(Layer("x", w), stats, Target(sparsity=0.5), sparsegpt.Options())
    assert bool((_support(ours) != _support(theirs)).any())
