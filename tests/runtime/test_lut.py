"""Tables of partial sums against the dense product."""

import pytest
import torch

from lilliput.formats.binary import BinaryFormat
from lilliput.runtime import lut


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("width", "size"), [(64, 16), (64, -1), (50, 12), (13, -1), (30, 100), (8, 8)])
def test_the_result_is_that_of_the_decoded_weight(bits: int, width: int, size: int) -> None:
    g = torch.Generator().manual_seed(bits)
    w, x = torch.randn(9, width, generator=g), torch.randn(5, width, generator=g, dtype=torch.float64)
    form = BinaryFormat(bits, size)
    grid = form.fit(w, rounds=1)
    codes = form.encode(w, grid)
    expected = x @ form.decode(codes, grid).double().T
    torch.testing.assert_close(lut.matmul(x, form, codes, grid), expected, rtol=0, atol=1e-5)


def test_a_table_holds_every_signed_sum() -> None:
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = lut.tables(x)
    assert table.shape == (2, 2, 256)
    for k in (0, 1, 129, 255):
        signs = torch.tensor([1.0 if k >> j & 1 else -1.0 for j in range(8)], dtype=torch.float64)
        torch.testing.assert_close(table[:, :, k], (x.view(2, 2, 8) * signs).sum(-1))
    codes = torch.tensor([[-2, 1, 0, -1, 1, 1, -2, 0]])  # 0, 3, 2, 1, 3, 3, 0, 2 unsigned
    assert lut.planes(codes, 2).flatten().tolist() == [0b00111010, 0b10110110]
