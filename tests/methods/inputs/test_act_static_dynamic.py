"""Static ranges, beside what the calibration text shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.inputs.act_static_dynamic import METHOD, Options, inputs, spec
from lilliput.parts.inputs.uniform import SCALE, ZERO
from lilliput.parts.layer import Layer
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.target import Target

WIDTH = 32


def seen(*batches: Tensor) -> SiteStats:
    state = fold.init(WIDTH, fold.NAMES)
    for x in batches:
        state = fold.update(state, x)
    return fold.finish(state)


def drawn(seed: int, samples: int = 4) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 200, WIDTH, generator=draw) * torch.linspace(0.5, 4.0, WIDTH) + 0.3


def scale_of(x: Tensor, target: Target, **options: object) -> dict[str, Tensor]:
    o = Options(dynamic=False, **options)  # type: ignore[arg-type]
    return dict(inputs(Layer("x", torch.zeros(8, WIDTH)), seen(x[:2], x[2:]), target, o).tensors)


def test_minmax_covers_what_was_seen() -> None:
    x = drawn(0)
    own = scale_of(x, Target(bits=8))[SCALE]
    assert float(own) == pytest.approx(float(x.abs().max()) / 127.5, rel=1e-6)
    both = scale_of(x, Target(bits=8, symmetric=False))
    low, high = float(x.min()), float(x.max())
    assert float(both[SCALE]) == pytest.approx((high - low) / 255, rel=1e-6)
    assert int(both[ZERO]) == round(-128 - low / ((high - low) / 255))
    channels = scale_of(x, Target(bits=8), channels=True)[SCALE]
    torch.testing.assert_close(channels, x.abs().amax((0, 1)) / 127.5)
    groups = scale_of(x, Target(bits=8, group_size=8))[SCALE]
    torch.testing.assert_close(groups, x.abs().amax((0, 1)).view(4, 8).amax(1) / 127.5)


def test_average_is_the_mean_of_what_samples_show() -> None:
    x = drawn(1)
    channels = scale_of(x, Target(bits=8), channels=True, range="average")[SCALE]
    low, high = x.amin(1).clamp(max=0).mean(0), x.amax(1).clamp(min=0).mean(0)
    torch.testing.assert_close(channels, torch.maximum(-low, high) / 127.5)


def test_a_percentile_leaves_its_share_out() -> None:
    x = drawn(2)
    top = float(scale_of(x, Target(bits=8), range="percentile", percentile=95.0)[SCALE]) * 127.5
    share = float((x.abs() <= top).float().mean())
    assert 0.95 <= share < 0.99  # bins are half an octave wide


@pytest.mark.parametrize("rule", ["mse", "kl"])
def test_a_searched_range_beats_the_full_one_at_few_bits(rule: str) -> None:
    x = drawn(3)
    x[0, 0, 0] = 60.0  # one outlier
    target = Target(bits=4)
    errors = {}
    for name in ("minmax", rule):
        grid = inputs(
            Layer("x", torch.zeros(8, WIDTH)),
            seen(x),
            target,
            Options(dynamic=False, range=name),  # type: ignore[arg-type]
        )
        errors[name] = float((grid.round(x) - x).square().mean())
    assert errors[rule] < 0.5 * errors["minmax"]


def test_the_searched_range_is_nearly_the_best_of_all() -> None:
    x = drawn(4)
    found = float(scale_of(x, Target(bits=4), range="mse")[SCALE])

    def error(scale: float) -> float:
        return float(((x / scale).round().clamp(-8, 7) * scale - x).square().mean())

    best = min(error(float(x.abs().max()) / 7.5 * share) for share in torch.linspace(0.1, 1.0, 60).tolist())
    assert error(found) < 1.2 * best


@pytest.mark.parametrize(
    ("options", "target", "says"),
    [
        ({"range": "mse"}, Target(bits=8), "dynamic: false"),
        ({"range": "mse", "dynamic": False}, Target(bits=8, symmetric=False), "symmetric"),
        ({"clip": 0.9, "dynamic": False}, Target(bits=8), "clip"),
    ],
)
def test_contradictions_are_refused(options: dict[str, object], target: Target, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        spec(target, Options(**options), WIDTH)  # type: ignore[arg-type]


def test_dynamic_ranges_read_no_text() -> None:
    assert METHOD.read(Options()) == frozenset()


def test_eight_bits_of_both_lose_less_than_a_hundredth_on_gaussian_data() -> None:
    from lilliput.methods import get
    from lilliput.target import Target

    draw = torch.Generator().manual_seed(6)
    x, weight = torch.randn(200, WIDTH, generator=draw), torch.randn(24, WIDTH, generator=draw)
    rtn = get("rtn")
    layer = rtn.spec.run(  # type: ignore[attr-defined]
        Layer("x", weight), seen(x), Target(bits=8, group_size=16), rtn.parse({"search": "minmax"})
    )
    rounded = inputs(layer, seen(x), Target(bits=8, group_size="channel"), Options()).round(x)
    exact = x @ weight.T
    assert float((rounded @ layer.decode().T - exact).norm() / exact.norm()) < 1e-2


def test_an_infinite_input_is_nan_where_the_scale_is_the_tokens() -> None:
    x = drawn(7)
    x[0, 3, 2] = float("inf")
    rounded = inputs(Layer("x", torch.zeros(8, WIDTH)), seen(x[1:]), Target(bits=8), Options()).round(x)
    assert bool(rounded[0, 3].isnan().any())
    assert bool(torch.isfinite(rounded[1:]).all())
