"""Integer or float, whichever loses less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.inputs.mofq import Options, inputs, spec
from lilliput.parts.inputs import chosen
from lilliput.parts.inputs.chosen import FORM, TOP, ChosenInput
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.layer import Layer
from lilliput.stats import fold
from lilliput.target import Target

WIDTH = 16


def made(x: Tensor, bits: int, clip: bool) -> InputGrid:
    stats = fold.finish(fold.update(fold.init(WIDTH, fold.NAMES), x))
    return inputs(Layer("x", torch.zeros(4, WIDTH)), stats, Target(bits=bits), Options(clip=clip))


def even() -> Tensor:
    return torch.rand(2, 500, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1


def heavy() -> Tensor:
    x = torch.randn(2, 500, WIDTH, generator=torch.Generator().manual_seed(1))
    return x.sign() * x.abs() ** 4


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("clip", [True, False])
def test_even_inputs_get_integers_and_heavy_tails_floats(bits: int, clip: bool) -> None:
    floats = {4: "e2m1", 6: "e3m2", 8: "e4m3"}[bits]
    for x, name in ((even(), f"int{bits}"), (heavy(), floats)):
        grid = made(x, bits, clip)
        assert chosen.describe(bits, int(grid.tensors[FORM])) == name
        if not clip:
            assert float(grid.tensors[TOP]) == pytest.approx(float(x.abs().max()), rel=1e-6)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_it_loses_no_more_than_either(bits: int) -> None:
    for x in (even(), heavy()):
        grid = made(x, bits, False)
        errors = []
        for form in (0, {4: 2, 6: 3, 8: 4}[bits]):
            tensors = {FORM: torch.tensor([form], dtype=torch.uint8), TOP: x.abs().max().reshape(1)}
            errors.append(float((InputGrid(ChosenInput(bits), tensors).round(x) - x).square().mean()))
        assert float((grid.round(x) - x).square().mean()) == pytest.approx(min(errors), rel=1e-6)


def test_inputs_of_zero_are_kept() -> None:
    grid = made(torch.zeros(1, 5, WIDTH), 8, True)
    assert torch.equal(grid.round(torch.zeros(2, WIDTH)), torch.zeros(2, WIDTH))
    assert bool(torch.isfinite(grid.tensors[TOP]).all())


@pytest.mark.parametrize(("target", "says"), [({"bits": 5}, "4, 6 or 8"), ({"bits": 8, "symmetric": False}, "zero")])
def test_what_has_no_float_is_refused(target: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        spec(Target(**target), Options(), WIDTH)  # type: ignore[arg-type]
