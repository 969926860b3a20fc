import pytest
import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats import known
from lilliput.formats.affine import AffineFormat, from_target
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.linear import LinearSpec, decode
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import quantized
from lilliput.target import Target


def _weight(rows: int = 7, width: int = 33, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def _loss(form: AffineFormat | IntegerFormat, w: Tensor, h: Tensor | None = None, **more: object) -> float:
    grid = form.fit(w, importance=h, **more)  # type: ignore[arg-type]
    miss = (form.decode(form.encode(w, grid), grid) - w).double().square()  # type: ignore[arg-type]
    return float((miss if h is None else miss * h).sum())


@pytest.mark.parametrize("size", [-1, 8, 50])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_bytes_sizes_and_reading(size: int, bits: int) -> None:
    form, w = AffineFormat(bits, size), _weight()
    grid = form.fit(w)
    part = QuantizedPart(form, form.encode(w, grid), grid)
    packed = part.pack()
    assert {n: (t.dtype, tuple(t.shape)) for n, t in packed.items()} == form.stored(7, 33)
    assert part.bits() == form.size_bits(7, 33) == 7 * 33 * bits + 7 * {-1: 1, 8: 5, 50: 1}[size] * 32
    read = decode(
        LinearSpec("x", "x", 7, 33, quantized(form)), {"x.weight" + n: t for n, t in packed.items()}.__getitem__
    )
    assert torch.equal(read, part.decode())
    assert torch.equal(part.rows(2, 5).decode(), part.decode()[2:5])
    assert known.from_plain(form.plain()) == form


@pytest.mark.parametrize("offset", [0.0, 0.1, -0.3])
def test_covering_reaches_both_ends_and_codes_are_the_nearest(offset: float) -> None:
    """Errors of at most half a step, wherever the range lies, up to what float32 loses."""
    form, w = AffineFormat(3, 11, torch.float32), _weight() + offset
    grid = form.fit(w, search=False)
    codes = form.encode(w, grid)
    miss = (form.decode(codes, grid) - w).abs().view(7, 3, 11)
    assert bool((miss <= grid.scale.unsqueeze(-1) * (0.5 + 1e-4)).all())
    if offset == 0.0:
        assert int(codes.min()) == -4
        assert int(codes.max()) == 3
    values = (torch.arange(-4, 4) - grid.zero.unsqueeze(-1)) * grid.scale.unsqueeze(-1)
    best = (values.unsqueeze(2) - w.view(7, 3, 11, 1)).abs().amin(-1)
    torch.testing.assert_close(miss, best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_search_loses_less_than_covering_and_than_integer_zeros(weighted: bool) -> None:
    w = _weight(64, 64)
    h = torch.rand(64, 64, generator=torch.Generator().manual_seed(2)) ** 4 if weighted else None
    for bits in (2, 3):
        form = AffineFormat(bits, 16)
        found = _loss(form, w, h)
        assert found < 0.9 * _loss(form, w, h, search=False)
        assert found < 0.97 * _loss(IntegerFormat(bits, False, 16), w, h, search="mse")


def test_no_unit_is_worse_than_covering() -> None:
    form, w = AffineFormat(2, 8), _weight(32, 64)

    def each(search: bool) -> Tensor:
        grid = form.fit(w, search=search)
        return (form.decode(form.encode(w, grid), grid) - w).square().view(32, 8, 8).sum(2)

    assert bool((each(True) <= each(False) * (1 + 1e-5)).all())


def test_equal_weights_and_dead_ones() -> None:
    w = torch.tensor([[0.3] * 6, [-0.02] * 6, [0.0] * 6, [1e4, 1e4 + 8, 1e4, 1e4, 1e4, 1e4]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        form = AffineFormat(4, -1, dtype)
        grid = form.fit(w)
        out = form.decode(form.encode(w, grid), grid)
        torch.testing.assert_close(out[:3], w[:3], rtol=4 * torch.finfo(dtype).eps, atol=0.0)
        torch.testing.assert_close(out[3], w[3], rtol=1e-3 + torch.finfo(dtype).eps, atol=0.0)
    nothing = AffineFormat(4, 4).fit(torch.randn(2, 8), importance=torch.zeros(8))
    assert bool(torch.isfinite(nothing.scale).all() & torch.isfinite(nothing.zero).all())


def test_what_is_refused() -> None:
    with pytest.raises(PlanError, match="positive group size or 'channel'"):
        from_target(Target(format="affine", group_size="tensor"))
    with pytest.raises(PlanError, match="9 bits"):
        AffineFormat(9, 8)
    with pytest.raises(PlanError, match="scales of kind 'int8/256'"):
        from_target(Target(format="affine", group_size=8, scale_dtype="int8/256"))
    bad = _weight()
    bad[0, 0] = float("inf")
    with pytest.raises(LilliputError, match="1 values that are NaN"):
        AffineFormat(4, 8).fit(bad)
    with pytest.raises(LilliputError, match="exceeds the range of float16"):
        AffineFormat(4, 8).fit(_weight() * 1e9)
