"""Truncated SVD under each weighting against the papers' own equations, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.methods.weight.svd_truncate import Options, compress, needs, rank_of, scheme
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import LowRankPart, LowRankSpec
from lilliput.parts.scheme import of
from lilliput.stats.site import SiteStats
from lilliput.target import Target

SHAPES = [(20, 30), (30, 20)]


def case(rows: int, width: int, large: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, SiteStats]:
    """Weight, inputs [tokens, width] of which the first channel is `large` times as big, and their statistics."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, width, generator=g) @ torch.randn(width, width, generator=g) / width**0.5
    x[:, 0] *= large
    stats = SiteStats(width, 200, gram=x.T @ x, absmean=x.abs().mean(0))
    return torch.randn(rows, width, generator=g), x, stats


def reference(w: Tensor, x: Tensor, rank: int, how: str, fisher: Tensor | None = None, axis: str = "") -> Tensor:
    """W S = U D VT, What = U_k D_k V_kT S^-1 for each paper's S (and R W = ... for FWSVD's rows)."""
    w, x = w.double(), x.double()
    s, r = torch.eye(w.shape[1], dtype=torch.float64), torch.eye(len(w), dtype=torch.float64)
    if how == "absmean":
        s = torch.diag(x.abs().mean(0).sqrt() + 1e-6)
    if how == "gram":
        s = torch.linalg.cholesky(x.T @ x)
    if fisher is not None and axis != "inputs":
        r = torch.diag(fisher.double().sum(1).sqrt())
    if fisher is not None and axis != "outputs":
        s = torch.diag(fisher.double().sum(0).sqrt())
    u, d, vt = torch.linalg.svd(r @ w @ s, full_matrices=False)
    return torch.linalg.inv(r) @ ((u[:, :rank] * d[:rank]) @ vt[:rank]) @ torch.linalg.inv(s)


def run(w: Tensor, stats: SiteStats, target: Target, fisher: Tensor | None = None, **options: Any) -> Layer:
    return compress(Layer("x", w, fisher=fisher), stats, target, Options(**{"factors": "float32", **options}))


def output_error(w: Tensor, layer: Layer, x: Tensor) -> float:
    return float((x.double() @ (w - layer.decode()).double().T).square().sum())


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("weighting", ["none", "absmean", "gram"])
@pytest.mark.parametrize("split", ["even", "right"])
def test_each_weighting_is_its_papers(rows: int, width: int, weighting: str, split: str) -> None:
    w, x, stats = case(rows, width)
    for rank in (1, 5, 11):
        out = run(w, stats, Target(rank=rank), weighting=weighting, split=split)
        torch.testing.assert_close(out.decode().double(), reference(w, x, rank, weighting), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("axis", ["outputs", "inputs", "both"])
def test_fisher_weights_rows_and_columns(rows: int, width: int, axis: str) -> None:
    w, x, stats = case(rows, width)
    fisher = torch.rand(rows, width, generator=torch.Generator().manual_seed(3)) ** 4
    out = run(w, stats, Target(rank=6), fisher, weighting="fisher", axis=axis)
    expected = reference(w, x, 6, "fisher", fisher, axis)
    torch.testing.assert_close(out.decode().double(), expected, rtol=1e-3, atol=2e-4)


def test_fisher_has_to_be_there() -> None:
    w, _, stats = case(20, 30)
    with pytest.raises(LilliputError, match="x has no Fisher information"):
        run(w, stats, Target(rank=6), weighting="fisher")
    with pytest.raises(LilliputError, match="contains NaN or infinity"):
        run(w, stats, Target(rank=6), torch.full((20, 30), torch.inf), weighting="fisher")
    # An expert that no token reached: all of its weights count alike.
    unseen = run(w, stats, Target(rank=6), torch.zeros(20, 30), weighting="fisher").decode()
    torch.testing.assert_close(unseen, run(w, stats, Target(rank=6)).decode(), rtol=0, atol=0)
    assert {o: needs(Options(weighting=o)) for o in ("none", "absmean", "gram", "fisher")} == {  # type: ignore[arg-type]
        "none": (),
        "absmean": ("absmean",),
        "gram": ("gram",),
        "fisher": ("fisher",),
    }


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_eckart_young_and_exactness_just_below_break_even(rows: int, width: int) -> None:
    w, _, stats = case(rows, width)
    s = torch.linalg.svdvals(w.double())
    for rank in (2, 7, 11):
        error = float((w - run(w, stats, Target(rank=rank)).decode()).double().square().sum())
        assert error == pytest.approx(float(s[rank:].square().sum()), rel=1e-5)
    thin = (w[:, :4] @ w[:4, :4].T @ torch.randn(4, width, generator=torch.Generator().manual_seed(1))).contiguous()
    for weighting in ("none", "absmean", "gram"):
        out = run(thin, stats, Target(rank=4), weighting=weighting)
        torch.testing.assert_close(out.decode(), thin, rtol=1e-4, atol=1e-4)


def test_no_exponent_is_the_plain_svd() -> None:
    w, _, stats = case(20, 30, large=50.0)
    plain, flat = (run(w, stats, Target(rank=6), **o) for o in ({}, {"weighting": "absmean", "alpha": 0.0}))
    torch.testing.assert_close(plain.decode(), flat.decode(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_one_large_channel_separates_the_weightings(rows: int, width: int) -> None:
    w, x, stats = case(rows, width, large=40.0)
    for ratio in (0.3, 0.5, 0.8):
        errors = [
            output_error(w, run(w, stats, Target(ratio=ratio), factors="float16", weighting=how), x)
            for how in ("gram", "absmean", "none")
        ]
        assert errors[0] < errors[1] < errors[2]


def test_factors_are_lords_with_the_values_on_the_right() -> None:
    w, x, stats = case(20, 30)
    (part,) = run(w, stats, Target(rank=5), weighting="gram", split="right").parts
    assert isinstance(part, LowRankPart)
    y = x.double() @ w.double().T
    u = torch.linalg.eigh(y.T @ y).eigenvectors.flip(1)[:, :5]
    torch.testing.assert_close(part.left.decode().double().abs(), u.abs(), rtol=0, atol=1e-4)
    torch.testing.assert_close(part.left.decode().T @ w, part.right.decode(), rtol=1e-3, atol=1e-4)


def test_ranks_from_ratio_and_what_stays_as_it_is() -> None:
    assert rank_of(Target(ratio=0.5), 30, 60) == 10
    for target in (Target(ratio=1.0), Target(rank=20), Target(rank=30)):
        assert rank_of(target, 30, 60) is None
        assert scheme(target, Options(), 30, 60).parts == ()
        layer = Layer("x", torch.ones(30, 60))
        assert compress(layer, SiteStats(60, 0), target, Options()) is layer
    assert rank_of(Target(rank=19), 30, 60) == 19
    with pytest.raises(PlanError, match=r"target\.ratio"):
        rank_of(Target(), 30, 60)
    for rank in (0, 31, 100_000):
        with pytest.raises(PlanError, match=rf"rank {rank} of a \[30, 60\] linear: give 1 to 30"):
            rank_of(Target(rank=rank), 30, 60)
    with pytest.raises(PlanError, match=r"no rank is left for a \[30, 60\] linear: give a target\.ratio of 0\.05"):
        rank_of(Target(ratio=0.01), 30, 60)
    assert rank_of(Target(ratio=0.05), 30, 60) == 1


@pytest.mark.parametrize("factors", ["float16", "bfloat16", "float32", "int8", "int3"])
def test_the_plan_knows_what_comes_out(factors: str) -> None:
    w, _, stats = case(20, 30)
    options = Options(factors=factors, weighting="gram")  # type: ignore[arg-type]
    out = compress(Layer("x", w), stats, Target(ratio=0.7), options)
    planned = scheme(Target(ratio=0.7), options, 20, 30)
    assert of(out) == planned
    assert isinstance(planned.parts[0], LowRankSpec)
    assert sum(p.bits() for p in out.parts) == planned.size_bits(20, 30)


@pytest.mark.parametrize("weighting", ["none", "absmean", "gram"])
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize(("rows", "width"), [(12, 40), (40, 12), (5, 5)])
def test_few_tokens_dead_channels_and_flat_rows(rows: int, width: int, tokens: int, weighting: str) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    x[:, :2] = 0
    absmean = x.abs().mean(0) if tokens else torch.zeros(width)
    stats = SiteStats(width, tokens, gram=x.T @ x, absmean=absmean)
    for w in (torch.ones(rows, width), torch.zeros(rows, width), case(rows, width)[0]):
        out = run(w, stats, Target(rank=2), weighting=weighting, factors="float16").decode()
        assert bool(torch.isfinite(out).all())
        assert float(out.norm()) <= 3 * float(w.norm()) + 1e-6
        if tokens and weighting == "gram":
            assert float((x @ (w - out).T).norm()) <= float((x @ w.T).norm()) + 1e-6
    torch.testing.assert_close(
        run(torch.ones(rows, width), stats, Target(rank=2), weighting=weighting).decode(),
        torch.ones(rows, width),
        rtol=1e-3,
        atol=1e-3,
    )
