from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats import known
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.nested import NestedFormat
from lilliput.target import Target

KINDS = ("e8m0", "e4m3", "int8/256", "int8/5", "int4/row", "int3/16", "int3/2")


def _weight(rows: int = 12, width: int = 80, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=g) * torch.exp(torch.randn(rows, 1, generator=g) * 0.5) * 0.05


def _form(kind: str, bits: int = 4, symmetric: bool = True, group: int | str = 16) -> NestedFormat:
    made = known.from_target(
        Target.model_validate({"bits": bits, "symmetric": symmetric, "group_size": group, "scale_dtype": kind})
    )
    assert isinstance(made, NestedFormat)
    return made


def _loss(form: Any, w: Tensor, **more: Any) -> float:
    grid = form.fit(w, **more)
    return float((form.decode(form.encode(w, grid), grid) - w).double().square().sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_what_is_packed_is_what_was_promised_and_reads_back(kind: str, symmetric: bool, search: Any) -> None:
    form, w = _form(kind, 3, symmetric, 24), _weight()  # 80 inputs: groups of 24, 24, 24 and 8
    grid = form.fit(w, search=search)
    codes = form.encode(w, grid)
    packed = form.pack(codes, grid)
    assert {k: (x.dtype, tuple(x.shape)) for k, x in packed.items()} == form.stored(12, 80)
    again = known.from_plain(form.plain())
    assert again == form
    for a, b in ((0, 12), (3, 8)):
        back = again.decode(*again.unpack(packed.__getitem__, 12, 80, a, b))
        assert torch.equal(back, form.decode(codes, grid)[a:b])
    if not kind.startswith("int8/"):
        assert torch.equal(form.decode(codes[3:8], grid.rows(3, 8)), form.decode(codes, grid)[3:8])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_is_never_worse_than_covering_and_zeros_stay(kind: str, symmetric: bool) -> None:
    form, w = _form(kind, 3, symmetric), _weight()
    w[:, 5] = 0
    assert _loss(form, w, search="mse") < _loss(form, w)
    grid = form.fit(w, search="mse")
    assert not bool(form.decode(form.encode(w, grid), grid)[:, 5].any())


def test_integer_scales_of_many_bits_are_group_quantization() -> None:
    """8-bit scales of a row: the loss is that of plain scales within 1 %, 2-bit ones lose more."""
    w = _weight()
    plain = _loss(IntegerFormat(4, True, 16), w)
    assert _loss(_form("int8/row"), w) == pytest.approx(plain, rel=0.01)
    assert _loss(_form("int2/row"), w) > 1.05 * plain


def test_sizes() -> None:
    """SpQR: b + (b_s + b_z) / 16 + 64 / 256 bits a weight."""
    spqr = _form("int3/16", 3, False)
    assert spqr.size_bits(10, 1024) == 10 * 1024 * 3 + 10 * 64 * 6 + 10 * 4 * 64
    assert spqr.size_bits(10, 1024) / 10240 == 3 + 6 / 16 + 64 / 256
    assert _form("int4/row").size_bits(10, 160) == 10 * (160 * 4 + 10 * 4 + 32)
    assert _form("int8/256", symmetric=False).size_bits(10, 160) == 10 * 160 * 4 + 100 * (8 + 4) + 32 + 32
    assert _form("e4m3").size_bits(10, 160) == 10 * (160 * 4 + 10 * 8) + 32


def test_microscaling_integers_follow_the_rule() -> None:
    """OCP MXINT8: elements in 64ths, so the largest level has exponent 6 when codes are whole numbers."""
    form, w = _form("e8m0", 8, True, 32), _weight(5, 64)
    peak = w.view(5, 2, 32).abs().amax(-1)
    assert torch.equal(form.fit(w).scales.values(), 2.0 ** (torch.floor(torch.log2(peak)) - 6))


def test_plain_floats_stay_the_plain_format() -> None:
    assert known.from_target(Target(bits=4, group_size=16, scale_dtype="bfloat16")) == IntegerFormat(
        4, True, 16, torch.bfloat16
    )
    assert _form("int3/16", 3, False).describe() == "int3 g16 asym int3/16 scales"


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 50)])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_shapes(kind: str, shape: tuple[int, int]) -> None:
    for symmetric in (True, False):
        form = _form(kind, 4, symmetric, 7)
        for w in (_weight(*shape), torch.full(shape, 0.25), torch.full(shape, -3e-5), torch.zeros(shape)):
            for search in ("minmax", "mse"):
                grid = form.fit(w, search=search)  # type: ignore[arg-type]
                back = form.decode(form.encode(w, grid), grid)
                assert bool(torch.isfinite(back).all())
                assert float((back - w).abs().max()) <= 0.51 * float(w.abs().max())


def test_what_cannot_be_had_is_refused() -> None:
    for group in ("tensor", "channel"):
        with pytest.raises(PlanError, match="one scale per"):
            _form("int4/row", group=group)
    with pytest.raises(PlanError, match=r"target\.bits"):
        known.from_target(Target(group_size=16, scale_dtype="e8m0"))
    w = _weight()
    w[1, 1] = float("nan")
    with pytest.raises(LilliputError, match="NaN or infinite"):
        _form("int3/16").fit(w)
