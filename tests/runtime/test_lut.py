"""Tables of partial sums against the dense product."""

from __future__ import annotations

import pytest
import torch

from lilliput.formats.binary import BinaryFormat
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.quantized import QuantizedSpec
from lilliput.parts.scheme import Scheme, quantized
from lilliput.parts.transform import Rotation
from lilliput.runtime import lut


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("width", "size"), [(64, 16), (64, -1), (48, 24), (8, 8), (120, 40)])
def test_the_result_is_that_of_the_decoded_weight(bits: int, width: int, size: int) -> None:
    g = torch.Generator().manual_seed(bits)
    w, x = torch.randn(9, width, generator=g), torch.randn(5, width, generator=g, dtype=torch.float64)
    form = BinaryFormat(bits, size)
    assert lut.form_of(quantized(form), width) == form
    grid = form.fit(w, rounds=1)
    codes = form.encode(w, grid)
    expected = x @ form.decode(codes, grid).double().T
    held = lut.planes(codes, bits)
    assert held.dtype == torch.uint8
    assert held.numel() * 8 == codes.numel() * bits, "as many bits as the file holds"
    torch.testing.assert_close(lut.matmul(x, held, grid), expected, rtol=0, atol=1e-5)
    assert torch.equal(lut.codes_of(held), codes)


def test_a_table_holds_every_signed_sum() -> None:
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = lut.tables(x)
    assert table.shape == (2, 2, 256)
    for k in (0, 1, 129, 255):
        signs = torch.tensor([1.0 if k >> j & 1 else -1.0 for j in range(8)], dtype=torch.float64)
        torch.testing.assert_close(table[:, :, k], (x.view(2, 2, 8) * signs).sum(-1))
    codes = torch.tensor([[-2, 1, 0, -1, 1, 1, -2, 0]])  # 0, 3, 2, 1, 3, 3, 0, 2 unsigned
    assert lut.planes(codes, 2).flatten().tolist() == [0b00111010, 0b10110110]


def test_what_tables_do_not_serve() -> None:
    form = BinaryFormat(3, 16)
    part = QuantizedSpec(form)
    assert lut.form_of(Scheme((part, part)), 64) is None
    assert lut.form_of(Scheme((part,), (Rotation("hadamard", 0),)), 64) is None
    assert lut.form_of(quantized(IntegerFormat(4, True, 16, torch.float16)), 64) is None
    for size, width in ((12, 48), (16, 40), (-1, 13)):
        assert lut.form_of(quantized(BinaryFormat(3, size)), width) is None
