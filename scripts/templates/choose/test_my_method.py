"""my-method against a slow version written from its equations, in float64."""

from __future__ import annotations

import pytest
import torch

from lilliput.formats.integer import IntegerFormat
from lilliput.methods.choose.my_method import Options, score
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def reference(weight: torch.Tensor, rows: torch.Tensor, form: IntegerFormat) -> float:
    """replace: your equations, as obvious as can be."""
    grid = form.fit(weight, search="mse")
    rounded = form.decode(form.encode(weight, grid), grid)
    each = [sum(float(x) ** 2 for x in row) for row in rounded - weight]
    return sum(float(v) * x for v, x in zip(rows, each, strict=True))


def test_my_method_agrees_with_the_reference() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(6, 32, generator=draw), torch.rand(6, generator=draw)
    target = Target(bits=4, group_size=16, scale_dtype="float16")
    errors = score(weight, SiteStats(32, 1, gram=torch.eye(32)), [target], rows, Options())
    assert errors == pytest.approx((reference(weight, rows, IntegerFormat(4, True, 16, torch.float16)),), rel=1e-5)
