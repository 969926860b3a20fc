"""Low-rank optima against the singular value decomposition, and against every other matrix of the rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.algebra import lowrank
from lilliput.errors import LilliputError, PlanError

SHAPES = [(12, 20), (20, 12), (9, 9), (1, 7), (7, 1)]


def case(rows: int, width: int, tokens: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs, float64."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g, dtype=torch.float64)
    x = torch.randn(tokens, width, generator=g, dtype=torch.float64) @ mix
    return torch.randn(rows, width, generator=g, dtype=torch.float64), x.T @ x


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_plain_errors_are_the_tail_of_the_singular_values(rows: int, width: int) -> None:
    w, _ = case(rows, width)
    found = lowrank.spectrum(w)
    s = torch.linalg.svdvals(w)
    torch.testing.assert_close(found.energy, s.square(), rtol=1e-8, atol=1e-10)
    tails = lowrank.tails(w, found.basis, None)
    assert tails.shape == (min(rows, width) + 1,)
    for rank in range(min(rows, width) + 1):
        basis = found.basis[:, :rank]
        error = lowrank.squared(w - basis @ (basis.T @ w))
        assert error == pytest.approx(float(s[rank:].square().sum()), abs=1e-9)
        assert float(tails[rank]) == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_whitening_and_projecting_the_outputs_are_one_matrix(rows: int, width: int) -> None:
    """SVD-LLM's W L = U S VT, What = U_k S_k V_kT L^-1, and LoRD's leading eigenvectors of W G WT."""
    w, gram = case(rows, width)
    factor = torch.linalg.cholesky(gram)
    u, s, vt = torch.linalg.svd(w @ factor, full_matrices=False)
    leading = torch.linalg.eigh(w @ gram @ w.T).eigenvectors.flip(1)
    basis = lowrank.spectrum(w, gram).basis
    for rank in (1, min(rows, width) // 2 + 1 if min(rows, width) > 1 else 1):
        whitened = (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(factor)
        ours = basis[:, :rank] @ (basis[:, :rank].T @ w)
        torch.testing.assert_close(ours, whitened, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours, leading[:, :rank] @ (leading[:, :rank].T @ w), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", ["none", "diagonal", "gram"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "width"), SHAPES[:2])
def test_no_matrix_of_the_rank_is_nearer(rows: int, width: int, weighted: bool, metric: str) -> None:
    w, gram = case(rows, width)
    m = {"none": None, "diagonal": gram.diagonal(), "gram": gram}[metric]
    r = torch.linspace(0.2, 2.0, rows, dtype=torch.float64) if weighted else None
    scale = torch.ones(rows, 1, dtype=torch.float64) if r is None else r[:, None]

    def error(product: Tensor) -> float:
        return lowrank.squared(scale * (w - product), m)

    rank = 3
    left = lowrank.spectrum(w, m, r).basis[:, :rank] / scale
    best = left @ lowrank.project(left, w, r)
    root = torch.eye(width, dtype=torch.float64)
    if m is not None:
        root = torch.diag(m.sqrt()) if m.dim() == 1 else torch.linalg.cholesky(m)
    s = torch.linalg.svdvals(scale * w @ root)
    assert error(best) == pytest.approx(float(s[rank:].square().sum()), rel=1e-6)
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = left + 0.1 * torch.randn(rows, rank, generator=g, dtype=torch.float64)
        assert error(other @ lowrank.project(other, w, r)) >= error(best) * (1 - 1e-9)


def test_the_right_factor_is_least_squares_and_no_metric_changes_it() -> None:
    w, gram = case(10, 14)
    left = torch.randn(10, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    right = lowrank.project(left, w)
    torch.testing.assert_close(right, torch.linalg.lstsq(left, w).solution)
    gradient = left.T @ (w - left @ right) @ gram
    assert float(gradient.abs().max()) < 1e-8 * float((left.T @ w @ gram).abs().max())
    left[:, 3] = left[:, 2]  # no full rank: still finite, and as near
    flat = lowrank.project(left, w)
    torch.testing.assert_close(left @ flat, left[:, :3] @ lowrank.project(left[:, :3], w))


def test_singular_and_empty_metrics() -> None:
    """Directions that no token reached cost nothing; among them the weights decide."""
    w, gram = case(16, 12, tokens=4)
    found = lowrank.spectrum(w, gram)
    basis = found.basis[:, :4]
    assert lowrank.squared(w - basis @ (basis.T @ w), gram) < 1e-12 * lowrank.squared(w, gram)
    full = found.basis
    torch.testing.assert_close(full @ (full.T @ w), w)
    torch.testing.assert_close(lowrank.spectrum(w, gram * 0).energy, lowrank.spectrum(w).energy)
    nothing = lowrank.spectrum(torch.zeros(5, 3))
    torch.testing.assert_close(nothing.basis.T @ nothing.basis, torch.eye(3, dtype=torch.float64))
    assert not bool(nothing.energy.any())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(value: float) -> None:
    w, gram = case(4, 6)
    for name in ("weight", "Gram matrix"):
        broken = (w if name == "weight" else gram).clone()
        broken[1, 1] = value
        with pytest.raises(LilliputError, match=f"{name}.*NaN or infini"):
            lowrank.spectrum(broken if name == "weight" else w, gram if name == "weight" else broken)


def test_break_even_and_possible_ranks() -> None:
    for rows, width in ((7, 9), (8, 8), (576, 1536)):
        rank = lowrank.break_even(rows, width)
        assert rank * (rows + width) >= rows * width > (rank - 1) * (rows + width)
    assert lowrank.checked(7, 7, 9) == 7
    for rank in (0, 8):
        with pytest.raises(PlanError, match="give 1 to 7"):
            lowrank.checked(rank, 7, 9)


@pytest.mark.parametrize(("rows", "width"), [(9, 5), (5, 9)])
def test_a_root_at_hand_changes_nothing(rows: int, width: int) -> None:
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(rows, width, generator=g), torch.randn(30, width, generator=g)
    gram = x.T @ x
    root = lowrank.root_of(w, gram)
    assert (root is None) == (rows <= width)
    plain, known = lowrank.spectrum(w, gram), lowrank.spectrum(w, gram, root=root)
    assert torch.equal(plain.basis, known.basis)
    assert torch.equal(plain.energy, known.energy)
    if root is not None:
        other = lowrank.spectrum(w, gram, root=2 * root)
        assert not torch.equal(other.energy, plain.energy), "it is taken"
    assert lowrank.root_of(w, None) is None
    assert lowrank.root_of(w, gram.diagonal()) is None
