"""my-method against a slow version written from its equations, in float64."""

from __future__ import annotations

import pytest
import torch

from lilliput.methods.weight.my_method import Options, compress
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def reference(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """replace: your equations, as obvious as can be. Now: of all values on the grid, the nearest, one by one."""
    out = torch.empty(weight.shape, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            s, z = float(scale[row, column // group]), int(zero[row, column // group])
            values = [s * (code - z) for code in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
            out[row, column] = min(values, key=lambda v: abs(v - float(weight[row, column])))
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_my_method_agrees_with_the_reference(bits: int, symmetric: bool) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    target = Target(bits=bits, group_size=16, symmetric=symmetric, scale_dtype="float16")
    layer = compress(Layer("x", weight), SiteStats(32, 0), target, Options(narrow=0.9))
    part = layer.parts[0]
    assert isinstance(part, QuantizedPart)
    scale = part.grid.scale.double()
    zero = torch.zeros_like(scale) if part.grid.zero is None else part.grid.zero
    expected = reference(weight, scale, zero, bits, 16)
    # Where two values are equally near, either is right: compare errors, not values.
    error, least = (layer.decode() - weight).double().abs(), (expected - weight).abs()
    torch.testing.assert_close(error, least, rtol=0, atol=1e-6)


def test_my_method_narrows_the_range() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    target = Target(bits=4, group_size=32, scale_dtype="float16")
    scales = []
    for narrow in (1.0, 0.5):
        part = compress(Layer("x", weight), SiteStats(32, 0), target, Options(narrow=narrow)).parts[0]
        assert isinstance(part, QuantizedPart)
        scales.append(part.grid.scale.float())
    torch.testing.assert_close(scales[1], 0.5 * scales[0], rtol=1e-3, atol=0)


def test_my_method_writes_on_the_support_only() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(32).expand(4, 32) % 2 == 0
    target = Target(bits=4, group_size=32, symmetric=False, scale_dtype="float16")
    layer = compress(Layer("x", weight).with_support(mask), SiteStats(32, 0), target, Options())
    assert not bool(layer.decode()[~mask].any())
