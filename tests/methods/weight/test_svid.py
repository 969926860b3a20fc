"""Signs and two vectors against the singular value decomposition of |W|."""

import pytest
import torch

from lilliput.errors import PlanError
from lilliput.methods.weight import svid
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target

TARGET = Target(format="sign", scale_dtype="float32")


def test_equals_signs_times_the_first_singular_pair() -> None:
    w = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).double()
    u, s, v = torch.linalg.svd(w.abs())
    layer = svid.compress(Layer("x", w.float()), SiteStats(20, 0), TARGET, svid.Options(importance=False))
    wanted = w.sign() * (s[0] * u[:, :1] * v[:1])
    torch.testing.assert_close(layer.decode().double(), wanted, rtol=1e-5, atol=1e-6)


def test_importance_is_a_scaling_of_the_columns() -> None:
    """Rank one of |W| diag(sqrt h), columns divided again."""
    g = torch.Generator().manual_seed(1)
    w, h = torch.randn(30, 20, generator=g).double(), torch.rand(20, generator=g).double() + 0.1
    u, s, v = torch.linalg.svd(w.abs() * h.sqrt())
    stats = SiteStats(20, 5, square=(h * 5).float())
    layer = svid.compress(Layer("x", w.float()), stats, TARGET, svid.Options(rounds=60))
    wanted = w.sign() * (s[0] * u[:, :1] * v[:1]) / h.sqrt()
    torch.testing.assert_close(layer.decode().double(), wanted, rtol=1e-4, atol=1e-5)


def test_needs_and_pruned_layers() -> None:
    assert svid.needs(svid.Options(importance=False)) == ()
    w = torch.ones(2, 3)
    with pytest.raises(PlanError, match="no code for 0"):
        svid.compress(Layer("x", w, support=w > 0), SiteStats(3, 0), TARGET, svid.Options())
