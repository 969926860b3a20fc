"""LPLR against its three lines in float64: bounds, budgets, and why the second factor sees the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.methods.weight.lplr import Options, compress, rank_of, scheme
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import LowRankPart, as_part, factor_spec
from lilliput.parts.scheme import of
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def weight(rows: int = 24, width: int = 36, decay: float = 0.8) -> Tensor:
    """Singular values fall by `decay` each."""
    g = torch.Generator().manual_seed(0)
    n = min(rows, width)
    u, v = (torch.linalg.qr(torch.randn(m, n, generator=g)).Q for m in (rows, width))
    return (u * decay ** torch.arange(n)) @ v.T


def run(w: Tensor, rank: int | None = None, **options: Any) -> LowRankPart:
    (part,) = compress(Layer("x", w), SiteStats(w.shape[1], 0), Target(rank=rank), Options(**options)).parts
    assert isinstance(part, LowRankPart)
    return part


def error(w: Tensor, out: Tensor) -> float:
    return float((w - out).double().square().sum())


@pytest.mark.parametrize("bits", ["int4", "int8", "float32"])
def test_sketch_quantize_fit_quantize(bits: str) -> None:
    w = weight()
    part = run(w, 7, left=bits, right=bits, seed=5)
    sketch = torch.randn(36, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 7**0.5
    a = as_part(w.double() @ sketch, factor_spec(bits)).decode()  # type: ignore[arg-type]
    assert torch.equal(part.left.decode(), a)
    fitted = torch.linalg.lstsq(a.double(), w.double()).solution
    b = as_part(fitted, factor_spec(bits)).decode()  # type: ignore[arg-type]
    torch.testing.assert_close(part.right.decode(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("basis", ["sketch", "singular"])
def test_unlimited_bits_and_enough_columns_are_exact(basis: str) -> None:
    w = weight()[:, :6] @ weight()[:6, :]
    part = run(w, 6, basis=basis, left="float32", right="float32")
    torch.testing.assert_close(part.decode(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.7, 0.98])
@pytest.mark.parametrize("rank", [4, 10])
def test_the_error_lies_above_eckart_young_and_singular_vectors_come_near(rank: int, decay: float) -> None:
    w = weight(decay=decay)
    least = float(torch.linalg.svdvals(w.double())[rank:].square().sum())
    for basis in ("sketch", "singular"):
        for bits in ("int8", "int4"):
            assert error(w, run(w, rank, basis=basis, left=bits, right=bits).decode()) >= least
    assert error(w, run(w, rank, basis="singular").decode()) < 1.05 * least + 1e-3
    assert error(w, run(w, rank, basis="singular").decode()) < error(w, run(w, rank).decode())


@pytest.mark.parametrize("bits", ["int4", "int3"])
def test_fitting_to_the_quantized_factor_beats_quantizing_both(bits: str) -> None:
    w = weight()
    for seed in range(3):
        part = run(w, 8, left=bits, right=bits, seed=seed)
        sketch = torch.randn(36, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 8**0.5
        columns = w.double() @ sketch
        apart = as_part(torch.linalg.pinv(columns) @ w.double(), factor_spec(bits)).decode()  # type: ignore[arg-type]
        assert error(w, part.decode()) < error(w, part.left.decode() @ apart)


@pytest.mark.parametrize(("left", "right"), [("int8", "int8"), ("int4", "int8"), ("int2", "float16")])
@pytest.mark.parametrize("budget", [2.0, 4.5, 9.0])
def test_the_rank_is_the_largest_within_the_budget(left: str, right: str, budget: float) -> None:
    options = Options(left=left, right=right, budget=budget)  # type: ignore[arg-type]
    rank = rank_of(Target(), options, 24, 36)
    assert scheme(Target(), options, 24, 36).size_bits(24, 36) <= budget * 24 * 36
    if rank < 24:
        assert scheme(Target(rank=rank + 1), options, 24, 36).size_bits(24, 36) > budget * 24 * 36
    out = compress(Layer("x", weight()), SiteStats(36, 0), Target(), options)
    assert of(out) == scheme(Target(), options, 24, 36)


def test_budgets_and_ranks_that_cannot_be() -> None:
    with pytest.raises(PlanError, match=r"do not suffice for rank 1: give 1\.02"):
        scheme(Target(), Options(budget=0.5), 24, 36)
    with pytest.raises(PlanError, match="give 1 to 24"):
        scheme(Target(rank=25), Options(), 24, 36)
    assert rank_of(Target(), Options(budget=64.0), 24, 36) == 24
    broken = weight()
    broken[2, 2] = float("nan")
    with pytest.raises(LilliputError, match="NaN or infinite"):
        run(broken, 4)


def test_a_seed_decides_everything() -> None:
    w = weight()
    assert torch.equal(run(w, 5, seed=1).decode(), run(w, 5, seed=1).decode())
    assert not torch.equal(run(w, 5, seed=1).decode(), run(w, 5, seed=2).decode())
    for flat in (torch.zeros(6, 9), torch.ones(6, 9)):
        torch.testing.assert_close(run(flat, 3).decode(), flat, rtol=0.02, atol=0.01)
