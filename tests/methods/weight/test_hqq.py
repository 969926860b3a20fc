"""HQQ against its equations, unit by unit in float64."""

import pytest
import torch
from torch import Tensor

from lilliput.errors import LilliputError
from lilliput.methods.weight import hqq, rtn
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target

EMPTY = SiteStats(48, 0)


def _weight(seed: int = 0) -> Tensor:
    """Gaussian with a few outliers, which is what p < 1 is for."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(12, 48, generator=g) * 0.05
    w[torch.rand(w.shape, generator=g) < 0.02] *= 6
    return w


def _target(bits: int, group: int | str, symmetric: bool) -> Target:
    return Target(bits=bits, group_size=group, symmetric=symmetric, scale_dtype="float32")


def _part(layer: Layer) -> QuantizedPart:
    (part,) = layer.parts
    assert isinstance(part, QuantizedPart)
    return part


def _reference(
    w: Tensor, scale: float, zero: float, bits: int, symmetric: bool, o: hqq.Options, real: bool = False
) -> tuple[float, float]:
    """One unit: the best (scale, zero) that the iteration meets; `real`: the zero is no integer."""
    low, high, p = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, o.norm

    def codes(s: float, z: float) -> Tensor:
        return (w / s + z).round().clamp(low, high) if real else ((w / s).round() + z).clamp(low, high)

    def loss(s: float, z: float) -> float:
        return float((w - (codes(s, z) - z) * s).abs().pow(p).sum())

    best = (loss(scale, zero), scale, zero)
    beta = o.beta
    for _ in range(o.iters):
        q = codes(scale, zero)
        e = w / scale - (q - zero)
        shrunk = e.sign() * (e.abs() - e.abs().clamp(min=1e-8).pow(p - 1) / beta).clamp(min=0)
        aim = w / scale - shrunk
        if not symmetric:
            zero = float((q - aim).mean())
            zero = zero if real else min(max(round(zero), low), high)
        c = q - zero
        top, bottom = float((c * aim).sum()), float((c * c).sum())
        if o.scale and top > 0 and bottom > 0:
            scale *= top / bottom
        best = min(best, (loss(scale, zero), scale, zero))
        beta *= o.kappa
    return best[1], best[2]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("scale", [True, False])
def test_grids_are_those_of_the_equations(bits: int, symmetric: bool, scale: bool) -> None:
    """To 1e-5 of each scale where the same round was best; sums in float32 may prefer another one in 1 unit of 50."""
    w, o = _weight(), hqq.Options(iters=8, start="minmax", scale=scale)
    part = _part(hqq.compress(Layer("x", w), EMPTY, _target(bits, 16, symmetric), o))
    start = part.format.fit(w)
    agree = 0
    for row in range(12):
        for group in range(3):
            zero = 0.0 if symmetric else float(start.zero[row, group])
            unit = w[row, group * 16 : group * 16 + 16].double()
            s, z = _reference(unit, float(start.scale[row, group]), zero, bits, symmetric, o)
            same = abs(float(part.grid.scale[row, group]) - s) < 1e-5 * s
            agree += same and (symmetric or float(part.grid.zero[row, group]) == z)
    assert agree >= 35


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("scale", [True, False])
def test_real_zero_points_are_those_of_the_equations(bits: int, scale: bool) -> None:
    """As above, zero points to 1e-3 of a step; and they serve the l_p error better than integer ones."""
    w, o = _weight(), hqq.Options(iters=8, start="minmax", scale=scale)
    target = Target(format="affine", bits=bits, group_size=16, scale_dtype="float32")
    part = _part(hqq.compress(Layer("x", w), EMPTY, target, o))
    start = part.format.fit(w, search=False)  # type: ignore[call-arg]
    agree = 0
    for row in range(12):
        for group in range(3):
            unit = w[row, group * 16 : group * 16 + 16].double()
            first = float(start.scale[row, group]), float(start.zero[row, group])
            s, z = _reference(unit, *first, bits, False, o, real=True)
            same = abs(float(part.grid.scale[row, group]) - s) < 1e-5 * s
            agree += same and abs(float(part.grid.zero[row, group]) - z) < 1e-3
    assert agree >= 34
    whole = hqq.compress(Layer("x", w), EMPTY, _target(bits, 16, False), o)

    def loss(found: Tensor) -> float:
        return float((w - found).double().abs().pow(0.7).sum())

    assert loss(part.decode()) < loss(whole.decode())


@pytest.mark.parametrize("group", [16, 20, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_unit_gets_worse_and_outliers_cost_less(group: int | str, symmetric: bool) -> None:
    w, target = _weight(1), _target(3, group, symmetric)

    def loss(layer: Layer) -> Tensor:
        return (w - layer.decode()).double().abs().pow(0.7)

    covering = rtn.compress(Layer("x", w), EMPTY, target, rtn.Options(search="minmax"))
    found = hqq.compress(Layer("x", w), EMPTY, target, hqq.Options(start="minmax", scale=True))
    assert float(loss(found).sum()) < 0.97 * float(loss(covering).sum())
    size = {"channel": 48, "tensor": 48}.get(str(group), group)
    for a in range(0, 48, int(size)):
        ours, theirs = (loss(x)[:, a : a + int(size)].sum(1) for x in (found, covering))
        if group != "tensor":
            assert bool((ours <= theirs * (1 + 1e-5)).all())
    assert torch.equal(
        hqq.compress(Layer("x", w), EMPTY, target, hqq.Options(start="minmax", iters=0)).decode(), covering.decode()
    )


def test_a_weight_that_is_not_finite_is_named() -> None:
    w = _weight()
    w[3, 3] = float("nan")
    with pytest.raises(LilliputError, match="1 values that are NaN"):
        hqq.compress(Layer("x", w), EMPTY, _target(4, 16, False), hqq.Options())
