"""Functions on integers, beside those of floating point."""

from __future__ import annotations

import math

import pytest
import torch

from lilliput.algebra import integers
from lilliput.algebra.integers import Scaled, scaled

FINE = 2.0**-10


def test_exp_is_within_a_hundredth() -> None:
    x = torch.linspace(-12.0, 0.0, 5000)
    found = integers.exp(scaled(x, FINE))
    assert found.codes.dtype == torch.int64
    assert float((found.value() - x.exp()).abs().max()) < 1e-2
    assert bool((found.codes >= 0).all())
    assert int(integers.exp(scaled(torch.tensor([-1000.0]), FINE)).codes) == 0


def test_erf_is_its_polynomial_and_gelu_within_two_hundredths() -> None:
    x = torch.linspace(-6.0, 6.0, 5001)
    x = scaled(x, FINE).value()
    found = integers.erf(scaled(x, FINE))
    printed = x.sign() * (-0.2888 * (x.abs().clamp(max=1.769) - 1.769).square() + 1)
    assert float((found.value() - printed).abs().max()) < 4 * FINE
    assert float((found.value() - torch.erf(x)).abs().max()) < 0.1  # the polynomial's own error, beside 0
    assert torch.equal(found.codes, -found.codes.flip(0))
    codes = integers.gelu(scaled(x, FINE))
    error = (codes.value() - torch.nn.functional.gelu(x)).abs()
    assert float(error.max()) < 2e-2
    assert float(error.square().mean().sqrt()) < 1e-2
    assert float(codes.value()[-1]) == pytest.approx(6.0, abs=1e-2)
    assert abs(float(codes.value()[0])) < 1e-2


def test_the_polynomial_is_completed_exactly_up_to_its_steps() -> None:
    x = torch.linspace(-1.0, 1.0, 100)
    for a, b, c in ((0.5, 0.3, -0.2), (-0.25, -1.1, 1.0)):
        found = integers.polynomial(scaled(x, FINE), a, b, c)
        assert float((found.value() - (a * (x + b).square() + c)).abs().max()) < 6 * FINE


def test_square_roots_are_the_integers_below() -> None:
    n = torch.cat([torch.arange(0, 3000), torch.tensor([2**31 - 1, 2**40, 2**40 - 1, 10**12 + 7])])
    assert integers.sqrt(n).tolist() == [math.isqrt(x) for x in n.tolist()]
    assert integers.sqrt(torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_softmax_is_within_a_hundredth_and_adds_up_to_one() -> None:
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) * 4
    found = integers.softmax(scaled(x, FINE)).value()
    assert float((found - x.softmax(-1)).abs().max()) < 1e-2
    assert float((found.sum(-1) - 1).abs().max()) < 1e-2
    assert bool((found <= 1).all())


def test_norms_are_within_a_hundredth() -> None:
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)) * 3 + 2
    centred = integers.layer_norm(scaled(x, FINE)).value()
    assert float((centred - torch.nn.functional.layer_norm(x, (64,), eps=0.0)).abs().max()) < 1e-2
    raw = integers.rms_norm(scaled(x, FINE)).value()
    assert float((raw - x / x.square().mean(-1, keepdim=True).sqrt()).abs().max()) < 1e-2
    assert not bool(integers.layer_norm(Scaled(torch.full((2, 8), 5), FINE)).codes.any())
    assert not bool(integers.rms_norm(Scaled(torch.zeros(2, 8, dtype=torch.int64), FINE)).codes.any())


def test_a_scale_without_ln_2_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ln 2"):
        integers.exp(Scaled(torch.zeros(1, dtype=torch.int64), 1.0))
