import pytest
import torch

from lilliput.algebra import hadamard
from lilliput.errors import PlanError


@pytest.mark.parametrize("width", [1, 2, 12, 20, 64, 576, 1536, 80, 240])
def test_matrix_is_orthonormal_with_entries_of_one_size(width: int) -> None:
    h = hadamard.matrix(width, seed=3)
    torch.testing.assert_close(h @ h.T, torch.eye(width, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(h.abs(), torch.full_like(h, width**-0.5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("width", [16, 24, 576])
def test_transform_equals_the_matrix(width: int) -> None:
    x = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(hadamard.transform(x), x @ hadamard.matrix(width), atol=1e-12, rtol=0)


def test_seeds_change_signs_only() -> None:
    plain, a, b = hadamard.matrix(24), hadamard.matrix(24, seed=0), hadamard.matrix(24, seed=1)
    assert torch.equal(a.abs(), plain.abs())
    assert not torch.equal(a, b)
    assert torch.equal(a, hadamard.matrix(24, seed=0))


@pytest.mark.parametrize("width", [3, 7, 6, 28, 36, 0])
def test_widths_without_a_transform_are_refused(width: int) -> None:
    with pytest.raises(PlanError, match=f"width {width}"):
        hadamard.matrix(width)


def test_paley_refuses_orders_that_it_cannot_make() -> None:
    with pytest.raises(ValueError, match="order 16"):
        hadamard.paley(16)
