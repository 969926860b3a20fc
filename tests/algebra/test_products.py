"""Products with kept weights against sums over all places, one by one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from lilliput.algebra import compiled, products
from lilliput.parts import bitmask

SHAPES = [(5, 64), (3, 200), (9, 577), (4, 16), (1, 1), (20, 128)]


def _matrix(rows: int, width: int, share: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Values, mask, and the float64 matrix that they stand for."""
    g = torch.Generator().manual_seed(rows * width)
    mask = torch.rand(rows, width, generator=g) < share
    packed = bitmask.gather(torch.randn(rows, width, generator=g), mask, dtype).pack()
    dense, place = torch.zeros(rows, width, dtype=torch.float64), 0
    for i in range(rows):
        for j in range(width):
            if packed["_mask"][i, j // 8] >> j % 8 & 1:
                dense[i, j] = packed[""][place]
                place += 1
    return packed[""], packed["_mask"], dense


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", products.DTYPES)
def test_products_and_dense_weights(wide: bool, dtype: torch.dtype) -> None:
    if wide and not products.wide():
        pytest.skip("this processor has no AVX-512")
    for rows, width in SHAPES:
        for share in (0.0, 0.1, 0.5, 1.0):
            values, mask, dense = _matrix(rows, width, share, dtype)
            begin = products.starts(mask)
            assert begin.tolist() == [0, *(dense != 0).sum(1).cumsum(0).tolist()]
            x = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
            with mock.patch.object(products, "wide", return_value=wide):
                product = products.Product(values, mask, begin)
            most = x.double().abs() @ dense.abs().T
            assert bool(((product(x).double() - x.double() @ dense.T).abs() <= 2e-6 * most).all())
            assert torch.equal(product(x), product(x))
            torch.testing.assert_close(product(x[:1]), product(x)[:1], rtol=0, atol=0)
            assert torch.equal(products.spread(values, mask, begin, width).double(), dense)


def test_torch_keeps_its_threads_when_those_of_numba_start() -> None:
    before = torch.get_num_threads()
    compiled.match_threads()
    assert torch.get_num_threads() == before
