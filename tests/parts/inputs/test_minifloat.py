"""Small floats for inputs, beside all their values, torch's own casts, and the library that engines load with."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats import tables
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.minifloat import GLOBAL, SCALE, FloatInput, whole

TABLES = ("e4m3", "e5m2", "e2m1", "e2m3", "e3m2")


def enumerated(name: str) -> list[tuple[float, bool]]:
    """All values of a table from its bits, each with whether its mantissa is even."""
    e, m = int(name[1]), int(name[3])
    bias = 2 ** (e - 1) - 1
    found = []
    for exponent in range(2**e):
        for fraction in range(2**m):
            if name == "e4m3" and exponent == 15 and fraction == 7:
                continue  # NaN
            if name == "e5m2" and exponent == 31:
                continue  # infinity and NaN
            value = (
                2.0 ** (1 - bias) * fraction / 2**m
                if exponent == 0
                else 2.0 ** (exponent - bias) * (1 + fraction / 2**m)
            )
            found += [(value, fraction % 2 == 0), (-value, fraction % 2 == 0)]
    return sorted(found)


def nearest(x: float, values: list[tuple[float, bool]]) -> float:
    least = min(abs(x - v) for v, _ in values)
    near = [(v, even) for v, even in values if abs(x - v) == least]
    return near[0][0] if len(near) == 1 else next(v for v, even in near if even)


@pytest.mark.parametrize("name", TABLES)
def test_rounding_is_to_the_nearest_of_all_values(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    top = tables.FLOATS[name].top
    x = torch.randn(400, generator=draw) * top / 3
    x = torch.cat([x, torch.randn(200, generator=draw) * 2.0 ** tables.FLOATS[name].lowest, torch.tensor([0.0])])
    values = enumerated(name)
    grid = InputGrid(FloatInput(name, "tensor", dynamic=False), {SCALE: torch.ones(1)})
    expected = torch.tensor([nearest(v, values) for v in x.tolist()])
    assert torch.equal(grid.round(x).abs(), expected.abs())
    assert torch.equal(grid.round(x), expected)
    between = torch.tensor([(a[0] + b[0]) / 2 for a, b in itertools.pairwise(values) if a[0] != b[0]])
    assert torch.equal(grid.round(between), torch.tensor([nearest(v, values) for v in between.tolist()]))
    ordered = torch.linspace(-2 * top, 2 * top, 5000)
    assert bool((grid.round(ordered).diff() >= 0).all())


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_scale_one_within_the_range_is_a_cast(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 50
    grid = InputGrid(FloatInput(name, "tensor", dynamic=False), {SCALE: torch.ones(1)})
    assert torch.equal(grid.round(x), x.to(dtype).float())


@pytest.mark.parametrize("name", TABLES)
def test_dynamic_scales_take_the_largest_input_to_the_end(name: str) -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    x[4] = 0.0
    values = enumerated(name)
    top = tables.FLOATS[name].top
    for spec, size in ((FloatInput(name), 32), (FloatInput(name, "group", 8), 8)):
        rounded = InputGrid(spec).round(x)
        for row, got in zip(x.view(-1, size), rounded.view(-1, size), strict=True):
            scale = row.abs().max() / top if bool((row != 0).any()) else torch.tensor(1.0)
            expected = torch.tensor([nearest(v, values) for v in (row / scale).tolist()]) * scale
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    largest = x.abs().amax(1, keepdim=True)
    torch.testing.assert_close(InputGrid(FloatInput(name)).round(x).abs().amax(1, keepdim=True), largest)
    torch.testing.assert_close(InputGrid(FloatInput(name)).round(x * 4), InputGrid(FloatInput(name)).round(x) * 4)


@pytest.mark.parametrize(("name", "largest"), [("e2m1", 2), ("e2m3", 2), ("e3m2", 4), ("e4m3", 8), ("e5m2", 15)])
def test_block_scales_are_powers_of_two_by_the_rule(name: str, largest: int) -> None:
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, 64)
    x[3, :32] = 0.0
    rounded = InputGrid(FloatInput(name, "group", 32, "e8m0")).round(x)
    values = enumerated(name)
    for block, got in zip(x.view(-1, 32), rounded.view(-1, 32), strict=True):
        peak = float(block.abs().max())
        scale = 2.0 ** (math.floor(math.log2(peak)) - largest) if peak else 1.0
        expected = torch.tensor([nearest(v / scale, values) * scale for v in block.tolist()])
        assert torch.equal(got, expected)


def engine(
    x: Tensor, bits: int, strategy: str, group: int, dynamic: object, kind: object, factor: Tensor | None
) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(
        num_bits=bits,
        type="float",
        strategy=strategy,
        group_size=group,
        dynamic=dynamic,
        symmetric=True,
        scale_dtype=kind,
        zp_dtype=kind,
    )
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1), factor)
    codes = [fake_quantize(a, s, z, args, factor) for a, s, z in zip(x, scale, zero, strict=True)]
    return torch.stack(codes)


def drawn() -> Tensor:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(4)) * torch.logspace(-4, 1, 64)
    x[0, 2] = 0.0
    return x


def test_nvfp4_is_what_engines_load() -> None:
    from compressed_tensors.quantization.utils import generate_gparam

    x = drawn()
    factor = whole(x.abs().max() / 2, 6.0)  # so that some scales do not fit
    assert torch.equal(factor, generate_gparam(-x.abs().max() / 2, x.abs().max() / 2))
    theirs = engine(x, 4, "tensor_group", 16, "local", torch.float8_e4m3fn, factor)
    grid = InputGrid(FloatInput("e2m1", "group", 16, "e4m3"), {GLOBAL: factor})
    torch.testing.assert_close(grid.round(x), theirs, rtol=1e-6, atol=0)
    assert torch.equal(whole(torch.zeros(()), 6.0), generate_gparam(torch.zeros(()), torch.zeros(())))


@pytest.mark.parametrize(("bits", "name"), [(4, "e2m1"), (6, "e2m3"), (8, "e4m3")])
def test_even_block_scales_are_what_engines_load(bits: int, name: str) -> None:
    x = drawn() + 1e-9
    for number in range(5):
        x[1, number, 0] = 2.0 ** (number - 2) * 1.78
    x[1, 2, 32:] = torch.linspace(0.0, 7.9, 32)
    theirs = engine(x, bits, "group", 32, True, torch.uint8, None)
    assert torch.equal(InputGrid(FloatInput(name, "group", 32, "e8m0-even")).round(x), theirs)


def test_fp8_by_token_is_the_cast_that_engines_make() -> None:
    x = drawn()
    scale = x.abs().amax(-1, keepdim=True) / 448.0
    scale[scale == 0] = 1.0
    expected = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(InputGrid(FloatInput("e4m3")).round(x), expected)


@pytest.mark.parametrize("scales", ["float32", "e8m0", "e8m0-even", "e4m3"])
def test_an_infinite_input_is_not_hidden(scales: str) -> None:
    x = torch.randn(2, 64)
    x[0, 3] = float("inf")
    spec = FloatInput("e2m1", "group", 16, scales)  # type: ignore[arg-type]
    rounded = InputGrid(spec, {GLOBAL: torch.ones(1)} if scales == "e4m3" else {}).round(x)
    assert bool(rounded[0, :16].isnan().any())
    assert bool(torch.isfinite(rounded[1]).all())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"granularity": "token", "dynamic": False}, "granularity tensor"),
        ({"granularity": "group"}, "group_size"),
        ({"granularity": "group", "group_size": 32, "scales": "e8m0", "dynamic": False}, "while the model runs"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        FloatInput("e2m1", **wrong)  # type: ignore[arg-type]
