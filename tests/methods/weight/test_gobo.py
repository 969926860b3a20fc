"""GOBO against a slow version."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.weight import gobo
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target

EMPTY = SiteStats(40, 0)


def _weight() -> Tensor:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(30, 40, generator=g) * 0.05 + 0.01
    w[3, 4], w[20, 1] = 2.0, -1.5
    return w


def _target(bits: int = 3) -> Target:
    return Target(format="codebook", bits=bits, group_size="tensor", scale_dtype="float32")


def _slow(values: list[float], count: int) -> list[float]:
    """Means of bins of equal population, then nearest and mean in turns, until the sum of |w - c| stops falling."""
    values = sorted(values)
    bins: list[list[float]] = [[] for _ in range(count)]
    for i, v in enumerate(values):
        bins[i * count // len(values)].append(v)
    levels = [sum(b) / len(b) for b in bins]
    best, least = levels, float("inf")
    while True:
        bins = [[] for _ in range(count)]
        cost = 0.0
        for v in values:
            k = min(range(count), key=lambda k: abs(v - levels[k]))
            bins[k].append(v)
            cost += abs(v - levels[k])
        if cost >= least:
            return best
        best, least = levels, cost
        levels = [sum(b) / len(b) if b else c for b, c in zip(bins, levels, strict=True)]


@pytest.mark.parametrize("bits", [2, 3])
def test_equals_a_slow_version(bits: int) -> None:
    w = _weight()
    out = gobo.compress(Layer("x", w), EMPTY, _target(bits), gobo.Options(outliers=0.002))
    dense, apart = out.parts
    assert isinstance(dense, QuantizedPart)
    outside = apart.decode() != 0
    assert outside.nonzero().tolist() == [[3, 4], [20, 1]]
    torch.testing.assert_close(out.decode()[outside], w[outside], rtol=0, atol=1e-7)
    expected = torch.tensor(_slow(w[~outside].tolist(), 2**bits))
    torch.testing.assert_close(dense.grid.levels.flatten(), expected, rtol=1e-5, atol=1e-8)


def test_limits() -> None:
    w = _weight()
    all_out = gobo.compress(Layer("x", w), EMPTY, _target(), gobo.Options(outliers=1.0))
    torch.testing.assert_close(all_out.decode(), w, rtol=0, atol=1e-7)
    few = torch.tensor([0.5, 1.0])[torch.randint(0, 2, (30, 40), generator=torch.Generator().manual_seed(1))]
    assert gobo.scheme(_target(), gobo.Options(), 30, 40).size_bits(30, 40) == 1200 * 3 + 8 * 32 + 48 + 31 * 32
    assert float((gobo.compress(Layer("x", few), EMPTY, _target(), gobo.Options()).decode() - few).abs().max()) < 1e-6
    with pytest.raises(PlanError, match="group_size to tensor"):
        gobo.scheme(Target(format="codebook", bits=3, group_size=16), gobo.Options(), 30, 40)
