"""Asymmetric clipping against a search written out in float64."""

from itertools import pairwise

import pytest
import torch

from lilliput.formats.integer import IntegerFormat
from lilliput.methods.weight import asymmetric_clip as method
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target

ROWS, WIDTH, GROUP = 5, 20, 8  # a shorter last group
TARGET = Target(bits=2, group_size=GROUP, symmetric=False, scale_dtype="float32")


def _case() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(ROWS, WIDTH, generator=g) ** 3
    x = torch.randn(WIDTH, 50, generator=g)
    x[1] += x[0]
    return w, x


def _part(w: torch.Tensor, x: torch.Tensor, **options: object) -> QuantizedPart:
    stats = SiteStats(WIDTH, count=x.shape[1], gram=x @ x.T)
    (part,) = method.compress(Layer("a", w), stats, TARGET, method.Options.model_validate(options)).parts
    assert isinstance(part, QuantizedPart)
    return part


def test_each_group_has_the_best_ends() -> None:
    w, x = _case()
    part = _part(w, x, steps=4)
    found = part.decode().double()
    edges = [*range(0, WIDTH, GROUP), WIDTH]
    for row in range(ROWS):
        for a, b in pairwise(edges):
            v, inputs = w[row, a:b].double(), x[a:b].double()
            losses = []
            for upper in (1, 0.875, 0.75, 0.625):
                for lower in (1, 0.875, 0.75, 0.625):
                    low, high = lower * min(float(v.min()), 0), upper * max(float(v.max()), 0)
                    s = (high - low) / 3
                    z = round(-low / s)
                    q = ((v / s).round() + z).clamp(0, 3)
                    losses.append(float((((q - z) * s - v) @ inputs).square().sum()))
            ours = float(((found[row, a:b] - v) @ inputs).square().sum())
            assert ours == pytest.approx(min(losses), rel=1e-3)


def test_clipping_lowers_the_error_of_outputs() -> None:
    w, x = _case()
    wide, cut = (_part(w, x, steps=n).decode() for n in (1, 10))
    for a in range(0, WIDTH, GROUP):
        some = slice(a, a + GROUP)
        losses = [((y - w)[:, some] @ x[some]).square().sum(1) for y in (cut, wide)]
        assert bool((losses[0] <= losses[1] * (1 + 1e-5)).all())
    assert float(((cut - w) @ x).square().sum()) < float(((wide - w) @ x).square().sum())


def test_a_matrix_may_have_one_grid() -> None:
    w, x = _case()
    target = TARGET.model_copy(update={"group_size": "tensor"})
    (part,) = method.compress(
        Layer("a", w), SiteStats(WIDTH, count=x.shape[1], gram=x @ x.T), target, method.Options()
    ).parts
    assert isinstance(part, QuantizedPart)
    assert part.decode().unique().numel() <= 4


def test_pruned_weights_stay_zero() -> None:
    w, x = _case()
    support = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)) > 0.5
    stats = SiteStats(WIDTH, count=x.shape[1], gram=x @ x.T)
    done = method.compress(Layer("a", w, support=support), stats, TARGET, method.Options())
    assert not bool(done.decode()[~support].any())
    assert isinstance(done.parts[0], QuantizedPart)
    assert done.parts[0].format == IntegerFormat(2, False, GROUP, torch.float32)
