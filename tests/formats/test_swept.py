"""The sweep over grids of levels and of nested scales, against its equations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats import known
from lilliput.formats.affine import AffineFormat, AffineGrid
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.levels import LevelFormat
from lilliput.methods.weight import gptq, rtn
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target

TARGETS: list[dict[str, Any]] = [
    {"format": "nf4", "group_size": 16},
    {"format": "nf", "bits": 2, "group_size": "tensor"},
    {"format": "e2m1", "scale_dtype": "float32"},
    {"format": "mxfp4"},
    {"format": "nvfp4"},
    {"format": "fp8"},
    {"format": "nf3", "scale_dtype": "int8/256"},
    {"bits": 3, "group_size": 16, "scale_dtype": "int4/row"},
    {"bits": 3, "group_size": 16, "scale_dtype": "int3/16", "symmetric": False},
    {"format": "affine", "bits": 3, "group_size": 16},
]


def _target(plain: dict[str, Any]) -> Target:
    return known.completed(Target.model_validate(plain))


def _case(rows: int = 24, width: int = 80, tokens: int = 400) -> tuple[Tensor, SiteStats]:
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=g) * torch.exp(torch.randn(width, generator=g))
    x = torch.randn(tokens, width, generator=g) @ mix / width**0.5
    gram = x.T @ x
    return torch.randn(rows, width, generator=g) * 0.05, SiteStats(width, tokens, gram=gram, square=gram.diagonal())


def _loss(w: Tensor, layer: Layer, stats: SiteStats) -> float:
    d = (w - layer.decode()).double()
    return float(((d @ stats.need("gram").double()) * d).sum())


@pytest.mark.parametrize("plain", TARGETS)
def test_even_inputs_give_round_to_nearest_bit_for_bit(plain: dict[str, Any]) -> None:
    w, _ = _case()
    gram = torch.eye(80) * 7.0
    stats, target = SiteStats(80, 100, gram=gram, square=gram.diagonal()), _target(plain)
    for act_order in (True, False):
        swept = gptq.compress(Layer("x", w), stats, target, gptq.Options(act_order=act_order))
        assert torch.equal(swept.decode(), rtn.compress(Layer("x", w), stats, target, rtn.Options()).decode())


@pytest.mark.parametrize("plain", TARGETS)
def test_the_sweep_beats_rounding_to_nearest(plain: dict[str, Any]) -> None:
    w, stats = _case()
    target = _target(plain)
    swept = gptq.compress(Layer("x", w), stats, target, gptq.Options())
    assert _loss(w, swept, stats) < _loss(w, rtn.compress(Layer("x", w), stats, target, rtn.Options()), stats)
    refined = gptq.compress(Layer("x", w), stats, target, gptq.Options(refine=2))
    damped = SiteStats(80, 400, gram=stats.need("gram") + 0.2 * torch.diag(stats.need("gram").diagonal()))
    assert _loss(w, refined, damped) <= _loss(w, swept, damped)
    (part,) = refined.parts
    assert torch.equal(QuantizedPart(part.spec.format, *_read(part)).decode(), part.decode())  # type: ignore[attr-defined]


def _read(part: Any) -> tuple[Tensor, Any]:
    packed = part.pack()
    unpacked: tuple[Tensor, Any] = part.format.unpack(packed.__getitem__, 24, 80, 0, 24)
    return unpacked


@pytest.mark.parametrize("plain", TARGETS[:7])
def test_equals_the_printed_algorithm(plain: dict[str, Any]) -> None:
    """Levels in float64, H^-1 = UT U: same values but for ties of rounding, at most 5 in 1,000."""
    w, stats = _case()
    layer = gptq.compress(Layer("x", w), stats, _target(plain), gptq.Options(shrinkage=0.0, block=32))
    (part,) = layer.parts
    assert isinstance(part, QuantizedPart)
    assert isinstance(part.format, LevelFormat)
    gram = stats.need("gram").double()
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(80, dtype=torch.float64)
    order = stats.need("gram").diagonal().argsort(descending=True, stable=True)
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    size = part.format.group_size if part.format.group_size > 0 else 80
    scale = part.grid.values().double().expand(24, -1)[:, torch.arange(80) // size][:, order]
    levels = part.format.on(w).levels.double()
    work, out = w.double()[:, order].clone(), torch.empty(24, 80, dtype=torch.float64)
    for j in range(80):
        near = (work[:, j, None] - scale[:, j, None] * levels).abs().argmin(1)
        out[:, j] = levels[near] * scale[:, j]
        work[:, j:] -= ((work[:, j] - out[:, j]) / u[j, j])[:, None] * u[j, j:]
    found = layer.decode()[:, order].double()
    assert float((found - out).abs().gt(1e-6).double().mean()) <= 5e-3


@pytest.mark.parametrize("plain", TARGETS[:-1])
def test_nothing_is_written_outside_the_support(plain: dict[str, Any]) -> None:
    w, stats = _case()
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    for method in (gptq, rtn):
        out = method.compress(Layer("x", w, support=mask), stats, _target(plain), method.Options())  # type: ignore[attr-defined]
        assert bool((out.decode()[~mask] == 0).all())
        assert bool(out.decode()[mask].any())


@pytest.mark.parametrize("refine", [0, 2])
def test_whole_zero_points_are_those_of_integers(monkeypatch: pytest.MonkeyPatch, refine: int) -> None:
    """On the grid of integers, told as real numbers, the same codes come out."""
    w, stats = _case()
    options = gptq.Options(refine=refine)
    whole = gptq.compress(Layer("x", w), stats, Target(bits=3, group_size=16, symmetric=False), options)
    form = IntegerFormat(3, False, 16)

    def told(self: AffineFormat, weight: Tensor, *, importance: Tensor | None = None, search: bool = True) -> Any:
        grid = form.fit(weight, search="mse" if search else "minmax", importance=importance)
        assert grid.zero is not None
        return AffineGrid(grid.scale, grid.zero.half())

    monkeypatch.setattr(AffineFormat, "fit", told)
    real = gptq.compress(Layer("x", w), stats, Target(format="affine", bits=3, group_size=16), options)
    assert torch.equal(real.decode(), whole.decode())


def test_what_a_sweep_cannot_do_is_refused_by_the_plan() -> None:
    with pytest.raises(PlanError, match="static_groups"):
        gptq.scheme(_target(TARGETS[0]), gptq.Options(act_order=False, static_groups=False), 8, 64)
    with pytest.raises(PlanError, match="signed_scale"):
        gptq.scheme(_target(TARGETS[0]), gptq.Options(signed_scale=True), 8, 64)
