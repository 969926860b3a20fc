"""Quantile levels against numpy's quantiles, and equal use of the levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lilliput.methods.weight import quantile_quant
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.recipe import Target
from lilliput.stats.site import SiteStats

EMPTY = SiteStats(96, 0)


@pytest.mark.parametrize("group", ["tensor", "channel", 40])
@pytest.mark.parametrize("bits", [2, 4])
def test_levels_are_midpoints_of_quantiles(group: int | str, bits: int) -> None:
    w = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    target = Target(format="codebook", bits=bits, group_size=group, scale_dtype="float32")  # type: ignore[arg-type]
    (part,) = quantile_quant.compress(Layer("x", w), EMPTY, target, quantile_quant.Options()).parts
    assert isinstance(part, QuantizedPart)
    size = {"tensor": 96, "channel": 96}.get(str(group), 40)
    for row in range(1 if group == "tensor" else 6):
        for g, a in enumerate(range(0, 96, size)):
            unit = w if group == "tensor" else w[row, a : a + size]
            q = np.quantile(unit.double().numpy(), np.linspace(0, 1, 2**bits + 1))
            np.testing.assert_allclose(part.grid.levels[row, g].numpy(), (q[1:] + q[:-1]) / 2, rtol=1e-5, atol=1e-6)


def test_levels_are_used_about_equally() -> None:
    """A normal weight fills 16 levels to within a factor of 2 of each other (min-max integers: more than 100)."""
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    target = Target(format="codebook", bits=4, group_size="tensor")
    (part,) = quantile_quant.compress(Layer("x", w), EMPTY, target, quantile_quant.Options()).parts
    assert isinstance(part, QuantizedPart)
    used = torch.bincount(part.codes.flatten().long() + 8, minlength=16)
    assert int(used.min()) * 2 > int(used.max())
