import pytest
import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats import known
from lilliput.formats.sign import SignFormat, from_target
from lilliput.parts.linear import LinearSpec, decode
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import quantized
from lilliput.target import Target


def _weight(rows: int = 12, width: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def test_the_vectors_are_the_first_singular_pair() -> None:
    w = _weight()
    u, s, v = torch.linalg.svd(w.abs().double())
    grid = SignFormat(torch.float32).fit(w)
    product = grid.left.double().unsqueeze(1) * grid.right.double()
    torch.testing.assert_close(product, s[0] * u[:, :1] * v[:1], rtol=1e-5, atol=1e-8)
    assert float(grid.left.norm()) == pytest.approx(float(grid.right.norm()), rel=1e-5)


def test_weights_of_that_form_are_exact_and_signs_stay() -> None:
    w = _weight()
    form = SignFormat()
    grid = form.fit(w)
    once = form.decode(form.encode(w, grid), grid)
    assert torch.equal(once < 0, w < 0)
    again = form.decode(form.encode(once, form.fit(once)), form.fit(once))
    torch.testing.assert_close(again, once, rtol=2e-3, atol=0)


def test_importance_lowers_the_weighted_error() -> None:
    w, h = _weight(40, 60), torch.rand(60, generator=torch.Generator().manual_seed(1)) ** 4
    form = SignFormat()
    full = torch.rand(40, 60, generator=torch.Generator().manual_seed(2)) ** 4
    for weigh in (h, full):
        errors = []
        for importance in (None, weigh):
            grid = form.fit(w, importance=importance)
            errors.append(float(((form.decode(form.encode(w, grid), grid) - w).square() * weigh).sum()))
        assert errors[1] < errors[0]


def test_zero_rows_and_columns() -> None:
    w = _weight()
    w[2], w[:, 3] = 0, 0
    form = SignFormat()
    for weight in (w, torch.zeros(3, 4)):
        grid = form.fit(weight)
        back = form.decode(form.encode(weight, grid), grid)
        assert bool((back[weight == 0] == 0).all())


def test_bytes_sizes_and_reading() -> None:
    form, w = SignFormat(), _weight(7, 13)
    grid = form.fit(w)
    part = QuantizedPart(form, form.encode(w, grid), grid)
    packed = part.pack()
    assert {n: (t.dtype, tuple(t.shape)) for n, t in packed.items()} == form.stored(7, 13)
    assert part.bits() == 7 * 13 + 20 * 16
    read = decode(
        LinearSpec("x", "x", 7, 13, quantized(form)), {"x.weight" + n: t for n, t in packed.items()}.__getitem__
    )
    assert torch.equal(read, part.decode())
    assert torch.equal(part.rows(2, 5).decode(), part.decode()[2:5])
    assert known.from_plain(form.plain()) == form
    assert from_target(Target(format="sign", scale_dtype="bfloat16")) == SignFormat(torch.bfloat16)
    assert [int(packed[""][0]) >> i & 1 for i in range(8)] == (w[0, :8] >= 0).int().tolist()


def test_bad_values_are_refused() -> None:
    with pytest.raises(PlanError):
        SignFormat(torch.int8)
    with pytest.raises(LilliputError, match="NaN"):
        SignFormat().fit(_weight() * float("inf"))
    with pytest.raises(LilliputError, match="float32"):
        SignFormat().fit(_weight() * 1e14)
