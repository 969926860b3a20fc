"""Integer grids for inputs, beside loops over single numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.uniform import SCALE, ZERO, UniformInput


def slow(values: list[float], bits: int, symmetric: bool, clip: float = 1.0) -> list[float]:
    """Numbers that share a dynamic scale, on their grid, in float64."""
    low, high = min(0.0, *values) * clip, max(0.0, *values) * clip
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        scale, zero = max(-low, high) / ((2**bits - 1) / 2), 0
    else:
        scale = (high - low) / (2**bits - 1)
        zero = min(max(round(lowest - low / scale), lowest), highest) if scale else 0
    if scale == 0:
        return [0.0 for _ in values]
    return [(min(max(round(x / scale) + zero, lowest), highest) - zero) * scale for x in values]


@pytest.mark.parametrize(("bits", "symmetric", "size"), list(itertools.product([2, 4, 8], [True, False], [0, 8])))
def test_dynamic_rounding_is_that_of_single_numbers(bits: int, symmetric: bool, size: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    x = torch.randn(5, 16, generator=draw, dtype=torch.float64).float()
    x[2] = 0.0
    spec = UniformInput(bits, "group" if size else "token", size, symmetric, clip=0.9)
    expected = [
        [y for a in range(0, 16, size or 16) for y in slow(row[a : a + (size or 16)], bits, symmetric, 0.9)]
        for row in x.tolist()
    ]
    actual = InputGrid(spec).round(x)
    close = (actual.double() - torch.tensor(expected, dtype=torch.float64)).abs() < 1e-5
    assert float(close.double().mean()) > 0.97  # float32 may fall on the other side of a half


def test_a_scaled_token_rounds_alike() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    grid = InputGrid(UniformInput(4))
    torch.testing.assert_close(grid.round(x * 4.0), grid.round(x) * 4.0)


def test_static_scales_equal_dynamic_ones_where_all_tokens_have_the_same_largest_input() -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    x[:, 0] = 5.0
    scale = torch.tensor([5.0 / 127.5])
    static = InputGrid(UniformInput(8, "tensor", dynamic=False), {SCALE: scale})
    assert torch.equal(static.round(x), InputGrid(UniformInput(8)).round(x))


def test_an_asymmetric_static_grid_covers_its_range() -> None:
    spec = UniformInput(8, "tensor", symmetric=False, dynamic=False)
    scale, zero = spec.parameters(torch.tensor([-1.0]), torch.tensor([3.0]))
    assert zero is not None
    grid = InputGrid(spec, {SCALE: scale, ZERO: zero.to(torch.int32)})
    x = torch.linspace(-1.0, 3.0, 50)
    assert float((grid.round(x) - x).abs().max()) <= float(scale) / 2 + 1e-6
    assert float(grid.round(torch.tensor([9.0]))) == pytest.approx(3.0, abs=float(scale))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"bits": 9}, "2 to 8"),
        ({"bits": 8, "granularity": "channel"}, "granularity token"),
        ({"bits": 8, "granularity": "token", "dynamic": False}, "granularity tensor"),
        ({"bits": 8, "granularity": "group"}, "group_size"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        UniformInput(**wrong)  # type: ignore[arg-type]


def test_groups_have_to_divide_the_width() -> None:
    with pytest.raises(PlanError, match="divide"):
        UniformInput(8, "group", 24).stored(64)


def test_half_precision_comes_back_as_it_came() -> None:
    x: Tensor = torch.randn(3, 16).bfloat16()
    assert InputGrid(UniformInput(8)).round(x).dtype is torch.bfloat16
