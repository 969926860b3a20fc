"""Which grid a target names, and what text decides of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.inputs.minifloat import METHOD, Options, inputs, spec
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.minifloat import GLOBAL, SCALE, FloatInput
from lilliput.parts.layer import Layer
from lilliput.stats import fold
from lilliput.target import Target

WIDTH = 64


def drawn(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(4, 100, WIDTH, generator=draw) * torch.linspace(0.5, 4.0, WIDTH)


def made(x: Tensor, target: Target, **options: object) -> InputGrid:
    stats = fold.finish(fold.update(fold.init(WIDTH, fold.NAMES), x))
    return inputs(Layer("x", torch.zeros(8, WIDTH)), stats, target, Options(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"format": "fp8"}, FloatInput("e4m3")),
        ({"format": "fp8", "group_size": 32}, FloatInput("e4m3", "group", 32)),
        ({"format": "e5m2", "group_size": "tensor"}, FloatInput("e5m2", "tensor")),
        ({"format": "mxfp8"}, FloatInput("e4m3", "group", 32, "e8m0")),
        ({"format": "mxfp6"}, FloatInput("e2m3", "group", 32, "e8m0")),
        ({"format": "mxfp6-e3m2"}, FloatInput("e3m2", "group", 32, "e8m0")),
        ({"format": "mxfp4"}, FloatInput("e2m1", "group", 32, "e8m0")),
        ({"format": "nvfp4"}, FloatInput("e2m1", "group", 16, "e4m3")),
    ],
)
def test_the_format_names_the_grid(target: dict[str, object], expected: FloatInput) -> None:
    assert spec(Target(**target), Options(), WIDTH) == expected  # type: ignore[arg-type]


def test_a_step_without_a_format_has_fp8() -> None:
    target = METHOD.completed(Target())
    assert (target.format, target.bits, target.group_size) == ("fp8", 8, "channel")
    assert METHOD.completed(Target(format="int")).format == "int"  # which the plan refuses


def test_the_global_scale_is_that_of_the_largest_input() -> None:
    x = drawn(0)
    factor = made(x, Target(format="nvfp4")).tensors[GLOBAL]
    assert float(factor) == pytest.approx(448 * 6 / float(x.abs().max()), rel=1e-6)
    assert METHOD.needed(Target(format="nvfp4"), Options()) == {"low", "high"}
    assert METHOD.needed(Target(format="mxfp4"), Options()) == frozenset()


def test_static_ranges_are_what_text_shows() -> None:
    x = drawn(1)
    whole = made(x, Target(format="fp8"), dynamic=False).tensors[SCALE]
    torch.testing.assert_close(whole, (x.abs().max() / 448).reshape(1))
    groups = made(x, Target(format="fp8", group_size=16), dynamic=False).tensors[SCALE]
    torch.testing.assert_close(groups, x.abs().amax((0, 1)).view(4, 16).amax(1) / 448)
    mean = made(x, Target(format="fp8", group_size="tensor"), dynamic=False, range="average").tensors[SCALE]
    low, high = x.amin(1).mean(0).amin(), x.amax(1).mean(0).amax()
    torch.testing.assert_close(mean, (torch.maximum(-low, high) / 448).reshape(1))


def test_a_searched_range_is_nearly_the_best() -> None:
    x = drawn(2)
    x[0, 0, 0] = 80.0
    found = made(x, Target(format="e2m1", group_size="tensor"), dynamic=False, range="mse")

    def error(scale: float) -> float:
        grid = InputGrid(FloatInput("e2m1", "tensor", dynamic=False), {SCALE: torch.tensor([scale])})
        return float((grid.round(x) - x).square().mean())

    best = min(error(80.0 / 6 * 2.0 ** (-n / 8)) for n in range(48))
    assert error(float(found.tensors[SCALE])) < 1.05 * best
    assert error(float(found.tensors[SCALE])) < 0.5 * error(80.0 / 6)


def test_floats_beat_integers_where_tails_are_heavy() -> None:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(2000, WIDTH, generator=draw) / (torch.rand(2000, WIDTH, generator=draw) + 1e-3)
    from lilliput.parts.inputs.uniform import UniformInput

    floats = InputGrid(FloatInput("e4m3", "tensor")).round(x)
    integers = InputGrid(UniformInput(8, "tensor")).round(x)
    assert float((floats - x).square().mean()) < float((integers - x).square().mean())


def test_a_shift_of_exponents_is_a_product() -> None:
    """What makes a power-of-two scale of e2m1 weights free: the product is another e4m3 number."""
    levels = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    for power in range(-5, 6):
        shifted = levels * 2.0**power
        assert torch.equal(shifted.to(torch.float8_e4m3fn).float(), shifted)
        assert all(math.frexp(float(a))[0] == math.frexp(float(b))[0] for a, b in zip(levels, shifted, strict=True))


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        ({"format": "fp8"}, {"range": "mse"}, "dynamic: false"),
        ({"format": "fp8"}, {"power": "even"}, "e8m0"),
        ({"format": "mxfp4"}, {"dynamic": False}, "while the model runs"),
        ({"format": "nvfp4"}, {"dynamic": False}, "while the model runs"),
        ({"format": "mxfp4", "group_size": 16}, {}, "groups of 32"),
        ({"format": "fp8", "scale_dtype": "int8/256"}, {}, "float32, e8m0 or e4m3"),
        ({"format": "fp8"}, {"dynamic": False, "clip": 0.9}, "clip"),
    ],
)
def test_contradictions_are_refused(target: dict[str, object], options: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        spec(Target(**target), Options(**options), WIDTH)  # type: ignore[arg-type]
