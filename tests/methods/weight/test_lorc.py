"""LoRC against the singular value decomposition of what quantization left."""

from __future__ import annotations

import itertools

import pytest
import torch

from lilliput.errors import LilliputError, PlanError
from lilliput.methods.weight import lorc, rtn
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import LowRankPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def _layer(rows: int = 24, width: int = 40) -> Layer:
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) * 0.05
    target = Target(bits=3, group_size="channel")
    return rtn.compress(Layer("x", w), SiteStats(width, 0), target, rtn.Options(importance=False))


def _run(layer: Layer, rank: int, factors: str = "float16") -> Layer:
    stats = SiteStats(layer.weight.shape[1], 0)
    return lorc.compress(layer, stats, Target(rank=rank), lorc.Options.model_validate({"factors": factors}))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_equals_the_truncated_decomposition(shape: tuple[int, int], rank: int) -> None:
    layer = _layer(*shape)
    e = layer.rest().double()
    u, s, v = torch.linalg.svd(e, full_matrices=False)
    wanted = (u[:, :rank] * s[:rank]) @ v[:rank]
    out = _run(layer, rank)
    part = out.parts[1]
    assert isinstance(part, LowRankPart)
    torch.testing.assert_close(part.decode().double(), wanted, rtol=0, atol=2e-3 * float(s[0]))
    # as near to the rest as the best of that rank, to 1e-4
    assert float((e - part.decode()).norm()) <= (1 + 1e-4) * float((e - wanted).norm())
    # the square roots of the singular values go to either side
    torch.testing.assert_close(part.left.decode().norm(dim=0).double(), s[:rank].sqrt(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("factors", ["float16", "int8"])
def test_errors_never_rise_with_the_rank_and_the_full_one_restores(factors: str) -> None:
    layer = _layer()
    errors = [float(layer.rest().norm())]
    errors += [float(_run(layer, rank, factors).rest().norm()) for rank in range(4, 25, 4)]
    assert all(b <= a for a, b in itertools.pairwise(errors))
    assert errors[-1] < (1e-3 if factors == "float16" else 2e-2) * errors[0]


def test_eight_bits_cost_little() -> None:
    layer = _layer()
    half, small = _run(layer, 6), _run(layer, 6, "int8")
    assert float(small.rest().norm()) < 1.01 * float(half.rest().norm())
    assert small.parts[1].bits() == 64 * 6 * 8 + (24 + 6) * 16
    assert half.parts[1].bits() == 64 * 6 * 16


def test_nothing_left_over_and_rows_of_zeros() -> None:
    exact = Layer("x", torch.zeros(6, 8))
    assert not bool(_run(exact, 3).decode().any())
    w = torch.zeros(6, 8)
    w[2] = torch.arange(8.0)
    torch.testing.assert_close(_run(Layer("x", w), 4).decode(), w, rtol=2e-3, atol=1e-3)


def test_bad_targets_and_layers_are_refused() -> None:
    layer = _layer()
    with pytest.raises(PlanError, match=r"target\.rank"):
        lorc.scheme(Target(), lorc.Options(), 24, 40)
    for rank in (0, 25):
        with pytest.raises(PlanError, match=rf"rank {rank} of a \[24, 40\] linear: give 1 to 24"):
            lorc.scheme(Target(rank=rank), lorc.Options(), 24, 40)
    with pytest.raises(LilliputError, match="x is pruned"):
        _run(Layer("x", layer.weight, support=layer.weight > 0), 2)
    with pytest.raises(LilliputError, match="NaN"):
        _run(Layer("x", layer.weight * float("nan")), 2)
