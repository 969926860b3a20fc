"""Outlier-victim pairs, beside loops over pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.inputs.olive import Options, inputs, spec
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.pairs import PairInput
from lilliput.parts.inputs.uniform import SCALE
from lilliput.parts.layer import Layer
from lilliput.stats import fold
from lilliput.target import Target

WIDTH = 32
# Codes of e2m1 with bias 2 but for the smallest, which is the number of the reserved pattern.
FAR = sorted((2 + f) * 2 ** (e + 2) for e in range(4) for f in range(2))[1:]


def slow(x: float) -> float:
    """An outlier in units of the scale."""
    return min(FAR, key=lambda v: abs(abs(x) - v)) * (1 if x > 0 else -1)


def pair(a: float, b: float) -> tuple[float, float]:
    if max(abs(a), abs(b)) <= 7.0:
        return float(min(max(round(a), -7), 7)), float(min(max(round(b), -7), 7))
    return (slow(a), 0.0) if abs(a) >= abs(b) else (0.0, slow(b))


def drawn(seed: int, outliers: bool = True) -> Tensor:
    x = torch.randn(4, 100, WIDTH, generator=torch.Generator().manual_seed(seed)).clamp(-2.5, 2.5)
    if outliers:
        x[0, :, 3] *= 12.0
        x[1, 5, 8:10] = torch.tensor([30.0, -40.0])
        x[2, 7, 20] = 500.0
    return x


def made(x: Tensor, **options: object) -> InputGrid:
    stats = fold.finish(fold.update(fold.init(WIDTH, fold.NAMES), x))
    return inputs(Layer("x", torch.zeros(4, WIDTH)), stats, Target(bits=4), Options(**options))  # type: ignore[arg-type]


def test_every_pair_is_rounded_by_itself() -> None:
    assert FAR == [12, 16, 24, 32, 48, 64, 96]
    x = drawn(0)
    grid = InputGrid(PairInput(), {SCALE: torch.tensor([0.25])})
    rounded = grid.round(x)
    for row, got in zip((x.reshape(-1, 2) / 0.25).tolist(), (rounded.reshape(-1, 2) / 0.25).tolist(), strict=True):
        assert tuple(got) == pair(*row)
    units = (rounded / 0.25).reshape(-1, 2).abs()
    assert bool(((units > 7).sum(1) <= 1).all())  # at most one outlier
    assert bool((units.amin(1)[units.amax(1) > 7] == 0).all())  # whose neighbour is the victim
    assert {float(v) for v in units.flatten()} <= {*map(float, range(8)), *map(float, FAR)}


def test_without_outliers_it_is_int4() -> None:
    x = drawn(1, outliers=False)
    scale = 2.5 / 7
    rounded = InputGrid(PairInput(), {SCALE: torch.tensor([scale])}).round(x)
    torch.testing.assert_close(rounded, (x / scale).round().clamp(-7, 7) * scale)


def test_the_scale_is_three_standard_deviations() -> None:
    x = drawn(2) + 0.5
    sigma = float(x.double().std(correction=0))
    assert float(made(x).tensors[SCALE]) == pytest.approx(3 * sigma / 7, rel=1e-4)
    assert float(made(torch.zeros(1, 4, WIDTH)).tensors[SCALE]) == 1.0


def test_a_searched_scale_loses_nearly_the_least() -> None:
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(4, 500, WIDTH, generator=draw)
    x = torch.where(torch.rand(x.shape, generator=draw) < 0.02, x * 15, x)

    def error(scale: float) -> float:
        rounded = InputGrid(PairInput(), {SCALE: torch.tensor([scale])}).round(x)
        return float((rounded - x).square().mean())

    best = min(error(2.0 ** (n / 8)) for n in range(-40, 16))
    assert error(float(made(x, scale="search").tensors[SCALE])) < 1.1 * best


def test_nan_stays() -> None:
    x = drawn(5)
    x[0, 0, 4] = float("nan")
    rounded = made(drawn(5)).round(x)
    assert bool(rounded[0, 0, 4].isnan())
    assert int(rounded.isnan().sum()) == 1


def test_other_bits_and_odd_widths_are_refused() -> None:
    with pytest.raises(PlanError, match="4 bits"):
        spec(Target(bits=8), Options(), WIDTH)
    with pytest.raises(PlanError, match="zero points"):
        spec(Target(bits=4, symmetric=False), Options(), WIDTH)
    with pytest.raises(PlanError, match="in pairs"):
        PairInput().stored(33)
