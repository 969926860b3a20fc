"""my-method beside a slow version written from its equations."""

from __future__ import annotations

import torch

from lilliput.methods.inputs.my_method import Options, inputs
from lilliput.parts.layer import Layer
from lilliput.stats import fold
from lilliput.target import Target


def test_it_rounds_as_its_equations_say() -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stats = fold.init(16, ())
    actual = inputs(Layer("x", torch.zeros(4, 16)), stats, Target(bits=8), Options()).round(x.float())
    for row, rounded in zip(x, actual, strict=True):
        scale = 0.95 * float(row.abs().max()) / 127.5
        expected = torch.tensor([min(max(round(float(v) / scale), -128), 127) * scale for v in row])
        torch.testing.assert_close(rounded, expected, rtol=0, atol=1e-5)
