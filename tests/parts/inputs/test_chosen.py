"""Grids that text chooses between, beside all their values."""

from __future__ import annotations

import pytest
import torch

from lilliput.errors import PlanError
from lilliput.parts.inputs import chosen
from lilliput.parts.inputs.chosen import FORM, OFFSET, TOP, ChosenInput
from lilliput.parts.inputs.grid import InputGrid


def values(bits: int, form: int) -> list[float]:
    """All values of a float of 1 + e + m bits, from its patterns, up to its scale."""
    e, m = chosen.exponents(bits, form), form - 1
    found = set()
    for exponent in range(2**e):
        for fraction in range(2**m):
            size = fraction / 2**m if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction / 2**m)
            found |= {size, -size}
    return sorted(found)


@pytest.mark.parametrize(("bits", "names"), [(4, ["e3m0", "e2m1", "e1m2"]), (3, ["e2m0", "e1m1"])])
def test_floats_split_their_bits_in_all_ways(bits: int, names: list[str]) -> None:
    assert [chosen.describe(bits, form) for form in chosen.splits(bits)] == names
    assert chosen.describe(bits, 0) == f"int{bits}"
    assert [chosen.describe(8, form) for form in chosen.splits(8)] == ["e5m2", "e4m3", "e3m4", "e2m5", "e1m6"]


@pytest.mark.parametrize(("bits", "form"), [(bits, form) for bits in (3, 4, 6, 8) for form in chosen.splits(bits)])
def test_rounding_is_to_the_nearest_of_all_values(bits: int, form: int) -> None:
    top = 5.0
    levels = torch.tensor(values(bits, form), dtype=torch.float64)
    levels = levels / levels.max() * top
    x = torch.randn(500, generator=torch.Generator().manual_seed(bits)) * 3
    spec = ChosenInput(bits)
    rounded = InputGrid(spec, {FORM: torch.tensor([form], dtype=torch.uint8), TOP: torch.tensor([top])}).round(x)
    distance = (x.double()[:, None] - levels).abs()
    torch.testing.assert_close((rounded.double() - x.double()).abs(), distance.amin(1), rtol=0, atol=2e-6)
    assert float((rounded[:, None].double() - levels).abs().amin(1).max()) < 2e-6


def test_integers_have_the_usual_step() -> None:
    x = torch.linspace(-4.0, 4.0, 41)
    tensors = {FORM: torch.tensor([0], dtype=torch.uint8), TOP: torch.tensor([3.0])}
    scale = 3.0 / 7.5
    torch.testing.assert_close(InputGrid(ChosenInput(4), tensors).round(x), (x / scale).round().clamp(-8, 7) * scale)


def test_an_offset_halves_a_channels_grid() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    tensors = {FORM: torch.tensor([2], dtype=torch.uint8), TOP: torch.tensor([4.0])}
    plain = InputGrid(ChosenInput(4), tensors)
    offset = InputGrid(ChosenInput(4, True), tensors | {OFFSET: torch.tensor([0, 1, 3], dtype=torch.uint8)})
    expected = torch.stack([plain.round(x[:, j] * 2**k) / 2**k for j, k in enumerate((0, 1, 3))], 1)
    assert torch.equal(offset.round(x), expected)


def test_bits_that_none_has_are_refused() -> None:
    with pytest.raises(PlanError, match="3 to 8"):
        ChosenInput(2)
