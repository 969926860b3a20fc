"""Quantile levels against numpy's quantiles, and equal use of the levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lilliput.methods import get
from lilliput.methods.weight import quantile_quant
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target

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


def test_codes_carry_nearly_all_their_bits() -> None:
    """The entropy of 16 levels on a normal weight is above 3.9 bits; that of integers over the range is lower."""
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))

    def entropy(method: str, **target: Any) -> float:
        found = get(method)
        asked = Target(bits=4, group_size="tensor", **target)
        (part,) = found.spec.run(Layer("x", w), EMPTY, asked, found.parse({})).parts
        share = torch.bincount(part.codes.flatten().long() + 8, minlength=16).double() / w.numel()
        return float(-(share * share.clamp(min=1e-300).log2()).sum())

    assert entropy("quantile-quant", format="codebook") > 3.9
    assert entropy("rtn") < 3.7
