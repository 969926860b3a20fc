import pytest
import torch

from lilliput.algebra import lattice, obs
from lilliput.errors import LilliputError


def _gram(width: int, tokens: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return x.T @ x


def test_the_gram_matrix_is_left_alone() -> None:
    gram = _gram(20, 100)
    kept = gram.clone()
    obs.factorize(gram, 0.01, torch.arange(19, -1, -1))
    assert torch.equal(gram, kept)


def test_without_tokens_nothing_is_coupled() -> None:
    factor = obs.factorize(torch.zeros(8, 8))
    assert not bool(factor.coupling.triu(1).any())
    assert bool((factor.pivot == 1).all())


def test_a_dead_channel_is_coupled_to_none() -> None:
    gram = _gram(10, 100)
    gram[4], gram[:, 4] = 0, 0
    for damping in (0.0, 0.01):
        factor = obs.factorize(gram, damping)
        assert float(factor.coupling[:4, 4].abs().max()) == 0
        assert float(factor.coupling[4, 5:].abs().max()) == 0
        assert float(factor.pivot[4]) > 0
        assert factor.damping == damping


def test_damping_rises_until_the_matrix_is_positive_definite() -> None:
    gram = torch.full((6, 6), 2.0) - 0.5 * torch.eye(6)  # eigenvalue -0.5
    factor = obs.factorize(gram, 0.01)
    assert factor.damping == 1.0
    assert bool(torch.isfinite(factor.coupling.triu()).all())


def test_float64_steps_in_where_float32_is_too_coarse() -> None:
    base = torch.ones(40, 40, dtype=torch.float64) + 3e-8 * torch.eye(40, dtype=torch.float64)
    rounded = base.float()  # singular in float32, and in float64 once rounded: only damping can help, and little does
    factor = obs.factorize(rounded, 1e-9)
    assert factor.damping == 1e-9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_no_number_is_refused(value: float) -> None:
    gram = _gram(6, 20)
    gram[2, 2] = value
    with pytest.raises(LilliputError, match="Gram matrix"):
        obs.factorize(gram)


def test_pruning_without_a_grid_repairs_what_stays() -> None:
    """With a mask and no rounding the sweep is SparseGPT's update: W - What = E U, zeros outside the mask."""
    gram, g = _gram(30, 200), torch.Generator().manual_seed(3)
    w, mask = torch.randn(30, 5, generator=g), torch.rand(30, 5, generator=g) < 0.5
    factor = obs.factorize(gram)
    deviation = torch.empty_like(w)
    obs.settle(obs.reach(w, deviation, factor, 0, 30), deviation, w, factor.coupling, 0, None, None, mask)
    h = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(30, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    work, errors = w.T.double().clone(), torch.zeros(5, 30, dtype=torch.float64)
    for j in range(30):
        q = torch.where(mask[j], work[:, j], 0.0)
        errors[:, j] = (work[:, j] - q) / u[j, j]
        work[:, j + 1 :] -= errors[:, j : j + 1] * u[j, j + 1 :]
    torch.testing.assert_close(deviation.T.double(), errors @ u, rtol=0, atol=1e-5)
    assert float((w - deviation)[~mask].abs().max()) < 1e-6
    assert lattice.loss(gram, deviation) < lattice.loss(gram, w * ~mask)


def test_diagonals_are_those_of_the_damped_matrix_and_of_its_inverse() -> None:
    """To 1e-4 of themselves."""
    g = torch.Generator().manual_seed(8)
    x = torch.randn(200, 40, generator=g) @ torch.randn(40, 40, generator=g)
    x[:, 7] = 0.0
    gram = x.T @ x
    h = obs.regularized(gram, 0.01, 0.2)
    expected = gram.double() + torch.diag(0.2 * gram.double().diagonal() + 0.01 * gram.double().diagonal().mean())
    torch.testing.assert_close(h.double(), expected, rtol=1e-5, atol=0)
    factor = obs.factorize(gram, 0.01, None, 0.2)
    torch.testing.assert_close(obs.diagonal(factor).double(), expected.diagonal(), rtol=1e-4, atol=0)
    inverse = torch.linalg.inv(expected).diagonal()
    torch.testing.assert_close(obs.inverse_diagonal(factor).double(), inverse, rtol=1e-4, atol=0)
    assert float(obs.regularized(gram, 0.0, 0.0)[7, 7]) == 1.0
