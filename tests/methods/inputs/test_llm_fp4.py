"""The split, the largest value and the offsets, beside what they lose on the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.inputs.llm_fp4 import Options, inputs, spec
from lilliput.parts.inputs import chosen
from lilliput.parts.inputs.chosen import FORM, OFFSET, TOP, ChosenInput
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.layer import Layer
from lilliput.stats import fold
from lilliput.target import Target

WIDTH = 16


def made(x: Tensor, **options: object) -> InputGrid:
    stats = fold.finish(fold.update(fold.init(WIDTH, fold.NAMES), x))
    return inputs(Layer("x", torch.zeros(4, WIDTH)), stats, Target(bits=4), Options(**options))  # type: ignore[arg-type]


def drawn(heavy: bool) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 800, WIDTH, generator=draw)
    return x.sign() * x.abs() ** 3 if heavy else torch.rand(2, 800, WIDTH, generator=draw) * 2 - 1


@pytest.mark.parametrize("heavy", [True, False])
def test_it_is_nearly_the_best_split_and_range_of_all(heavy: bool) -> None:
    x = drawn(heavy)
    grid = made(x, offsets=False)

    def error(form: int, top: float) -> float:
        tensors = {FORM: torch.tensor([form], dtype=torch.uint8), TOP: torch.tensor([top])}
        return float((InputGrid(ChosenInput(4), tensors).round(x) - x).square().mean())

    largest = float(x.abs().max())
    best = min(error(form, r / 50 * largest) for form in chosen.splits(4) for r in range(1, 61))
    assert float((grid.round(x) - x).square().mean()) < 1.1 * best
    assert chosen.describe(4, int(grid.tensors[FORM])) == ("e3m0" if heavy else "e1m2")


def test_offsets_are_the_octaves_below_the_largest_channel() -> None:
    x = drawn(False) * torch.exp2(-torch.arange(WIDTH).float() * 0.45)
    x[..., 5] = 0.0
    grid = made(x)
    form = int(grid.tensors[FORM])
    most = 2 ** chosen.exponents(4, form) - 1
    largest = x.abs().amax((0, 1)).double()
    expected = (largest.max() / largest).log2().floor().clamp(0, most)
    expected[5] = 0
    assert grid.tensors[OFFSET].tolist() == expected.tolist()
    reach = float(grid.tensors[TOP]) / torch.exp2(expected)
    assert float((largest / reach).max()) < 2.0
    assert float((grid.round(x) - x).square().mean()) < float((made(x, offsets=False).round(x) - x).square().mean())


def test_the_product_with_shifted_weights_is_the_same() -> None:
    """What a kernel computes: codes without offsets, and weights whose columns have the power of two."""
    x = drawn(True) * torch.exp2(-torch.arange(WIDTH).float() / 3)
    weight = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    grid = made(x)
    factor = torch.exp2(grid.tensors[OFFSET].float())
    codes = chosen.on(x * factor, 4, int(grid.tensors[FORM]), grid.tensors[TOP])
    torch.testing.assert_close(codes @ (weight / factor).T, grid.round(x) @ weight.T)


def test_zero_points_are_refused() -> None:
    with pytest.raises(PlanError, match="zero points"):
        spec(Target(bits=4, symmetric=False), Options(), WIDTH)
