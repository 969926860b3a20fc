"""EoRA against the paper's route through the eigenspace, and against the plain SVD of what is left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lilliput.algebra import lowrank
from lilliput.errors import PlanError
from lilliput.methods.weight import gptq, rtn
from lilliput.methods.weight.eora import Options, compress, scheme
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import approximate, factor_spec
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def case(rows: int = 24, width: int = 40, tokens: int = 400) -> tuple[Tensor, SiteStats]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=g) @ torch.randn(width, width, generator=g)
    x = x * torch.exp(torch.randn(width, generator=g)) / width**0.5
    return torch.randn(rows, width, generator=g), SiteStats(width, tokens, gram=x.T @ x, square=x.square().sum(0))


def quantized(w: Tensor, stats: SiteStats, bits: int = 3) -> Layer:
    target = Target(bits=bits, group_size=16, scale_dtype="float16")
    return gptq.compress(Layer("x", w), stats, target, gptq.Options())


def lost(layer: Layer, stats: SiteStats) -> float:
    return lowrank.squared(layer.weight - layer.decode(), stats.gram)


@pytest.mark.parametrize(("rows", "width"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_product_is_the_papers(rows: int, width: int, rank: int) -> None:
    """dW' = dW Q L^1/2 = U S VT; B = U_r S_r, A = V_rT (Q L^1/2)^-1."""
    w, stats = case(rows, width)
    base = quantized(w, stats)
    delta, gram = base.rest().double(), stats.need("gram").double()
    values, vectors = torch.linalg.eigh(gram)
    space = vectors * values.sqrt()
    u, s, vt = torch.linalg.svd(delta @ space, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(space)
    out = compress(base, stats, Target(rank=rank), Options(factors="float32"))
    torch.testing.assert_close(out.parts[1].decode().double(), expected, rtol=1e-3, atol=1e-4)
    assert out.parts[0] is base.parts[0]
    assert lost(out, stats) == pytest.approx(float(s[rank:].square().sum()), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("step", ["gptq", "rtn"])
def test_it_beats_the_plain_svd_of_the_rest(bits: int, rank: int, step: str) -> None:
    w, stats = case()
    base = quantized(w, stats, bits)
    if step == "rtn":
        base = rtn.compress(Layer("x", w), stats, Target(bits=bits, group_size=16), rtn.Options())
    plain = base.with_part(approximate(base.rest(), rank, factor_spec("float16")))
    ours, eighths = (
        compress(base, stats, Target(rank=rank), Options(factors=f))  # type: ignore[arg-type]
        for f in ("float16", "int8")
    )
    assert lost(ours, stats) < 0.98 * lost(plain, stats)
    assert lost(plain, stats) < lost(base, stats)
    assert lost(eighths, stats) < 1.02 * lost(ours, stats)
    assert eighths.parts[1].bits() < 0.7 * ours.parts[1].bits()


def test_more_rank_is_never_worse_and_full_rank_restores_the_weight() -> None:
    w, stats = case()
    base = quantized(w, stats, 2)
    errors = [lost(compress(base, stats, Target(rank=r), Options(factors="float32")), stats) for r in (1, 3, 9, 20, 24)]
    assert errors == sorted(errors, reverse=True)
    whole = compress(base, stats, Target(rank=24), Options(factors="float32"))
    torch.testing.assert_close(whole.decode(), w, rtol=0, atol=1e-4)


def test_few_tokens_leave_no_error_that_the_rank_can_reach() -> None:
    w, _ = case()
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(1))
    x[:, 3] = 0.0
    stats = SiteStats(40, 4, gram=x.T @ x, square=x.square().sum(0))
    base = quantized(w, stats)
    out = compress(base, stats, Target(rank=4), Options(factors="float32"))
    assert lost(out, stats) < 1e-6 * lost(base, stats) + 1e-9
    blind = compress(base, replace(stats, count=0, gram=stats.need("gram") * 0), Target(rank=4), Options())
    assert bool(torch.isfinite(blind.decode()).all())


def test_ranks_that_cannot_be_are_refused_by_the_plan() -> None:
    assert scheme(Target(rank=8), Options(), 8, 20).size_bits(8, 20) == 8 * 28 * 8 + 16 * (8 + 8)
    for rank in (0, 9):
        with pytest.raises(PlanError, match="give 1 to 8"):
            scheme(Target(rank=rank), Options(), 8, 20)
    with pytest.raises(PlanError, match=r"target\.rank"):
        scheme(Target(), Options(), 8, 20)
