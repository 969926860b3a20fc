"""Static where inputs are small, by token where they are large."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.inputs.fptq import Options, inputs, spec
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.policy import MODE
from lilliput.parts.inputs.uniform import SCALE, UniformInput
from lilliput.parts.layer import Layer
from lilliput.stats import fold
from lilliput.target import Target

WIDTH = 16


def made(x: Tensor, cut: float = 15.0) -> InputGrid:
    stats = fold.finish(fold.update(fold.init(WIDTH, fold.NAMES), x))
    return inputs(Layer("x", torch.zeros(4, WIDTH)), stats, Target(bits=8), Options(cut=cut))


@pytest.mark.parametrize(("largest", "mode"), [(14.9, 0), (15.0, 1), (200.0, 1)])
def test_the_cut_decides(largest: float, mode: int) -> None:
    x = torch.randn(2, 50, WIDTH, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    x[1, 4, 2] = -largest
    grid = made(x)
    assert int(grid.tensors[MODE]) == mode
    scale = torch.tensor([largest / 127.5])
    static = InputGrid(UniformInput(8, "tensor", dynamic=False), {SCALE: scale})
    other = InputGrid(UniformInput(8)) if mode else static
    torch.testing.assert_close(grid.round(x), other.round(x))
    torch.testing.assert_close(grid.tensors[SCALE], scale)


def test_what_equalization_leaves_is_below_the_cut() -> None:
    """s = max / log2(2 + max) leaves log2(2 + max)."""
    top = torch.linspace(15.0, 149.9, 200)
    assert float((top / (top / torch.log2(2 + top))).max()) < 7.3 < Options().cut


def test_zero_points_are_refused() -> None:
    with pytest.raises(PlanError, match="symmetric"):
        spec(Target(bits=8, symmetric=False), Options(), WIDTH)
