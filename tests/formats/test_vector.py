"""Formats whose codes span several outputs: vectors and walks."""

import pytest
import torch

from lilliput.errors import LilliputError, PlanError, SourceError
from lilliput.formats import known
from lilliput.formats.format import Format
from lilliput.formats.trellis import TrellisFormat
from lilliput.formats.vector import VectorFormat, VectorGrid
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.target import Target

SPECS = [("e8", 2), ("vector", 2), ("vector", 3), ("vector", 4), ("trellis", 2), ("trellis", 3), ("trellis-half", 2)]
SPECS += [("trellis-half", 4), ("trellis", 5)]


def made(name: str, bits: int, unit: int = 0) -> Format:
    target = Target(format=name, bits=bits, scale_dtype="float16").model_copy(update={"group_size": unit})
    return known.from_target(target)


def weight(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)) * 0.02


@pytest.mark.parametrize(("name", "bits"), SPECS)
@pytest.mark.parametrize("unit", [0, -1])
@pytest.mark.parametrize(("rows", "width"), [(16, 12), (21, 5), (1, 3), (300, 2)])
def test_files_hold_what_was_decoded(name: str, bits: int, unit: int, rows: int, width: int) -> None:
    form, w = made(name, bits, unit), weight(rows, width)
    grid = form.fit(w)
    codes = form.encode(w, grid)
    part = QuantizedPart(form, codes, grid)
    assert codes.shape == w.shape
    tensors = part.pack()
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == form.stored(rows, width)
    assert known.from_plain(form.plain()) == form
    for start, stop in ((0, rows), (rows // 3, rows), (rows // 2, rows // 2 + 1)):
        back = form.decode(*form.unpack(tensors.__getitem__, rows, width, start, stop))
        assert torch.equal(back, part.decode()[start:stop])
        assert torch.equal(part.rows(start, stop).decode(), part.decode()[start:stop])
    out = torch.zeros(rows, width)
    QuantizedSpec(form).add_to(out, tensors.__getitem__)
    assert torch.equal(out, part.decode())
    stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    groups = len(tensors[""]) * 8 // max(width, 1)
    assert form.size_bits(rows, width) <= stored <= form.size_bits(rows, width) + 8 * groups


@pytest.mark.parametrize(
    ("name", "bits", "most"),
    [
        ("e8", 2, 0.093),
        ("vector", 2, 0.115),
        ("vector", 3, 0.036),
        ("trellis", 2, 0.083),
        ("trellis-half", 2, 0.044),
        ("trellis", 3, 0.023),
        ("trellis-half", 4, 0.0045),
    ],
)
def test_errors_on_a_gaussian_matrix(name: str, bits: int, most: float) -> None:
    """Of the variance; the best scalar grids have 0.117 and 0.0345."""
    form, w = made(name, bits), weight(192, 32)
    grid = form.fit(w)
    miss = form.decode(form.encode(w, grid), grid) - w
    assert float(miss.square().mean() / w.square().mean()) < most


@pytest.mark.parametrize(("name", "bits"), SPECS)
def test_decoded_values_are_their_own_nearest(name: str, bits: int) -> None:
    form, w = made(name, bits), weight(48, 6)
    grid = form.fit(w)
    once = form.decode(form.encode(w, grid), grid)
    assert torch.equal(form.decode(form.encode(once, grid), grid), once)


@pytest.mark.parametrize(("name", "bits"), SPECS)
def test_zeros_equal_rows_and_what_is_no_number(name: str, bits: int) -> None:
    for unit in (0, -1):
        form = made(name, bits, unit)
        for w in (torch.zeros(16, 3), torch.full((16, 3), 0.5)):
            grid = form.fit(w)
            assert bool(torch.isfinite(form.decode(form.encode(w, grid), grid)).all())
        with pytest.raises(LilliputError, match="NaN or infinite"):
            form.fit(torch.full((4, 4), float("nan")))
        with pytest.raises(LilliputError, match="exceeds the range of float16"):
            form.fit(torch.full((4, 4), 1e8))


def test_few_distinct_vectors_are_learned_exactly() -> None:
    g = torch.Generator().manual_seed(0)
    entries = torch.randn(8, 4, generator=g).half().float()
    w = entries[torch.randint(0, 8, (5 * 9,), generator=g)].view(5, 9, 4).transpose(1, 2).reshape(20, 9)
    form = VectorFormat(4, 8, True, False, torch.float32)
    grid = form.fit(w)
    torch.testing.assert_close(form.decode(form.encode(w, grid), grid), w, rtol=2e-3, atol=1e-4)


def test_importance_draws_the_entries() -> None:
    w = weight(64, 40)
    form = made("vector", 2)
    counts = torch.where(torch.arange(40) < 4, 100.0, 1.0)
    plain, drawn = (form.fit(w, importance=x) for x in (None, counts))

    def miss(grid: object) -> torch.Tensor:
        return (form.decode(form.encode(w, grid), grid) - w)[:, :4].square().sum()

    assert miss(drawn) < 0.5 * miss(plain)
    with pytest.raises(LilliputError, match="importance"):
        form.fit(w, importance=torch.full((40,), float("nan")))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"format": "e8", "bits": 3}, "2 bits"),
        ({"format": "e8", "bits": 2, "group_size": 32}, "group_size to channel or tensor"),
        ({"format": "vector", "bits": 5}, "2 to 4 bits"),
        ({"format": "trellis", "bits": 6}, "1 to 5 bits"),
        ({"format": "trellis-half", "bits": 5}, "1 to 5 bits"),
        ({"format": "trellis"}, r"target\.bits"),
        ({"format": "e88", "bits": 2}, "'e8'"),
    ],
)
def test_what_they_cannot_do_is_refused(target: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        known.from_target(Target.model_validate({"group_size": "tensor", **target}))


def test_a_kind_of_another_version_is_refused() -> None:
    with pytest.raises(SourceError, match="newer"):
        known.from_plain({"kind": "leech"})


@pytest.mark.parametrize(("name", "bits"), SPECS)
@pytest.mark.parametrize("unit", [0, -1])
@pytest.mark.parametrize("rows", [3, 130, 530])
def test_a_block_is_settled_column_by_column_with_all_feedback(name: str, bits: int, unit: int, rows: int) -> None:
    """Each column's codes are the format's own for what the deviations before it ask for, compiled or not."""
    form, count = made(name, bits, unit), 7
    assert isinstance(form, VectorFormat | TrellisFormat)
    w = weight(rows, count)
    grid = form.fit(w)
    assert isinstance(grid, VectorGrid)
    columns = w.T.contiguous()
    coupling = torch.randn(count, count, generator=torch.Generator().manual_seed(5)) / 4
    codes, deviation = torch.zeros(count, rows, dtype=torch.int32), torch.empty(count, rows)
    aim = columns * 1.1
    form.settle(grid, rows)(aim, columns, coupling, codes, deviation)
    assert torch.equal(deviation, columns - form.decode(codes.T.contiguous(), grid).T)
    wanted = aim.double() + coupling.double().triu(1).T @ deviation.double()
    again = form.encode(wanted.T.float(), grid).T
    assert float((again != codes).double().mean()) < 0.01


def test_a_learned_table_is_smaller_than_its_data() -> None:
    with pytest.raises(PlanError, match=r"256 entries for 64 vectors of a \[8, 16\] linear"):
        VectorFormat(2, 8, True, True).check(8, 16)
    VectorFormat(2, 8, True, True).check(32, 16)
    VectorFormat(8, 16, False, True).check(8, 16)  # E8P's is not fitted to anything
