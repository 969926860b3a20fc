"""Every kind of part against the bytes that it stores: sizes, rows, reading back, config.json."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError, SourceError
from lilliput.formats.integer import IntegerFormat
from lilliput.parts import bitmask, known, pattern, sparse
from lilliput.parts.columns import ColumnsPart, ColumnsSpec
from lilliput.parts.dense import DensePart, DenseSpec
from lilliput.parts.layer import Layer
from lilliput.parts.linear import LinearSpec, decode
from lilliput.parts.lowrank import LowRankPart, LowRankSpec, plain_factors
from lilliput.parts.part import Part
from lilliput.parts.pattern import PatternPart, PatternSpec
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.rows import RowsPart, RowsSpec
from lilliput.parts.scheme import Scheme, from_plain, of
from lilliput.parts.sparse import SparsePart, SparseSpec, column_dtype
from lilliput.parts.transform import Rotation, Scale

ROWS, WIDTH = 7, 20


def _weight(rows: int = ROWS, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def _quantized(w: Tensor, bits: int = 3) -> QuantizedPart:
    form = IntegerFormat(bits, False, 8)
    grid = form.fit(w)
    return QuantizedPart(form, form.encode(w, grid), grid)


def _columns(count: int, dtype: torch.dtype = torch.float16) -> ColumnsPart:
    columns = torch.tensor([17, 3, 0, 9])[:count]
    return ColumnsPart(_weight()[:, columns], columns, WIDTH, dtype)


def _patterned(n: int, m: int) -> PatternPart:
    w = _weight()
    places = pattern.places_of(w.abs(), n, m)
    return PatternPart(n, m, _quantized(pattern.values_at(w, places, n, m)), places)


PARTS: dict[str, Callable[[], Part]] = {
    "dense": lambda: DensePart(_weight(), torch.bfloat16),
    "quantized": lambda: _quantized(_weight()),
    "sparse": lambda: sparse.gather(_weight(), _weight().abs(), 0.1),
    "sparse, none": lambda: sparse.gather(_weight(), _weight().abs(), 0.0),
    "sparse, all": lambda: sparse.gather(_weight(), _weight().abs(), 1.0, torch.float32),
    "columns": lambda: _columns(3),
    "columns, none": lambda: _columns(0),
    "columns in bfloat16": lambda: _columns(4, torch.bfloat16),
    "low rank": lambda: plain_factors(_weight(ROWS, 2), _weight(2, WIDTH)),
    "low rank, none": lambda: plain_factors(_weight(ROWS, 0), _weight(0, WIDTH)),
    "low rank of integers": lambda: LowRankPart(_quantized(_weight(ROWS, 2), 8), _quantized(_weight(2, WIDTH), 8)),
    "2:4": lambda: pattern.gather(_weight(), _weight().abs(), 2, 4),
    "1:5": lambda: pattern.gather(_weight(), _weight().abs(), 1, 5, torch.float32),
    "1:1": lambda: pattern.gather(_weight(), _weight().abs(), 1, 1),
    "1:20 of integers": lambda: _patterned(1, 20),
    "2:4 of integers": lambda: _patterned(2, 4),
    "bit mask": lambda: bitmask.gather(_weight(), _weight() > 0.3),
    "bit mask, none": lambda: bitmask.gather(_weight(), _weight() > 9, torch.bfloat16),
    "bit mask, all": lambda: bitmask.gather(_weight(), _weight() < 9, torch.float32),
    "bit mask in rows": lambda: RowsPart(bitmask.gather(_weight(2), _weight(2) > 0), torch.tensor([1, 4]), ROWS),
    "rows": lambda: RowsPart(_quantized(_weight(3)), torch.tensor([0, 2, 6]), ROWS),
    "rows, none": lambda: RowsPart(DensePart(_weight(0)), torch.zeros(0, dtype=torch.int64), ROWS),
    "sparse rows": lambda: RowsPart(sparse.gather(_weight(2), _weight(2), 0.2), torch.tensor([1, 4]), ROWS),
}


@pytest.mark.parametrize("kind", PARTS)
def test_bytes_sizes_and_values_are_those_of_the_spec(kind: str) -> None:
    part = PARTS[kind]()
    spec, packed = part.spec, part.pack()
    assert {n: (t.dtype, tuple(t.shape)) for n, t in packed.items()} == spec.stored(ROWS, WIDTH)
    assert packed[""].dim() == 1
    stored = 8 * sum(t.numel() * t.element_size() for t in packed.values())
    assert part.bits() == spec.size_bits(ROWS, WIDTH)
    assert part.bits() <= stored <= part.bits() + 8 * 4 * (ROWS + 1)  # every row of codes ends on a byte
    scheme = Scheme((spec,))
    linear = LinearSpec("x", "x", ROWS, WIDTH, scheme)
    read = decode(linear, {"x.weight" + n: t for n, t in packed.items()}.__getitem__)
    assert torch.equal(read, part.decode())
    assert known.from_plain(spec.plain()) == spec
    assert from_plain(scheme.plain()) == scheme
    assert spec.describe()


@pytest.mark.parametrize("kind", PARTS)
def test_rows_are_those_of_the_whole_and_stand_alone(kind: str) -> None:
    part = PARTS[kind]()
    for start, stop in ((0, ROWS), (2, 5), (6, 7)):
        cut = part.rows(start, stop)
        # A product of fewer rows may add up in another order.
        sums = kind.startswith("low rank")
        torch.testing.assert_close(cut.decode(), part.decode()[start:stop], rtol=0, atol=1e-6 if sums else 0)
        count = stop - start
        described = cut.spec.stored(count, WIDTH)
        assert {n: (t.dtype, tuple(t.shape)) for n, t in cut.pack().items()} == described
        assert cut.bits() == cut.spec.size_bits(count, WIDTH)


@pytest.mark.parametrize("kind", PARTS)
def test_two_of_a_kind_add_up_beside_each_other(kind: str) -> None:
    layer = Layer("x", _weight()).with_part(PARTS[kind](), PARTS["quantized"](), PARTS[kind]())
    scheme = of(layer)
    tensors = {"x.weight" + n: t for n, t in scheme.pack(layer).items()}
    linear = LinearSpec("x", "x", ROWS, WIDTH, scheme)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == linear.describe()
    torch.testing.assert_close(decode(linear, tensors.__getitem__), layer.decode(), rtol=0, atol=1e-6)


def test_sizes_by_hand() -> None:
    assert SparseSpec(0.1).size_bits(10, 100) == 100 * 32 + 11 * 32
    assert SparseSpec(0.001).count(7, 20) == 0
    assert SparseSpec(2.0).count(7, 20) == 140
    assert ColumnsSpec(3).size_bits(10, 100) == 3 * (160 + 32)
    assert LowRankSpec(2).size_bits(10, 100) == 220 * 16
    assert PatternSpec(2, 4).size_bits(10, 100) == 500 * (16 + 2)
    assert PatternSpec(1, 16).size_bits(10, 96) == 60 * (16 + 4)
    assert PatternSpec(1, 10, QuantizedSpec(IntegerFormat(4, True, -1))).size_bits(10, 100) == 100 * 8 + 160
    assert RowsSpec(3, DenseSpec(torch.float16)).size_bits(10, 100) == 300 * 16 + 96


@pytest.mark.parametrize("width", [1 << 16, (1 << 16) + 1])
def test_columns_beyond_sixteen_bits(width: int) -> None:
    w = torch.zeros(2, width)
    w[0, 0], w[0, -1], w[1, 65535] = 1.0, 2.0, 3.0
    part = sparse.gather(w, w.abs(), 3 / w.numel())
    assert part.pack()["_column"].dtype == (torch.uint16 if width <= 1 << 16 else torch.int32)
    assert part.bits() == 3 * (32 if width <= 1 << 16 else 48) + 3 * 32
    linear = LinearSpec("x", "x", 2, width, Scheme((part.spec,)))
    read = decode(linear, {"x.weight" + n: t for n, t in part.pack().items()}.__getitem__)
    assert torch.equal(read, w)
    assert torch.equal(part.decode(), w)
    assert column_dtype(width).itemsize == (2 if width <= 1 << 16 else 4)
    wide = ColumnsPart(w[:, [0, width - 1]], torch.tensor([0, width - 1]), width)
    held = {"x.weight" + n: t for n, t in wide.pack().items()}
    assert torch.equal(decode(LinearSpec("x", "x", 2, width, Scheme((wide.spec,))), held.__getitem__), wide.decode())


def test_the_highest_are_kept_and_among_equals_the_first() -> None:
    w = torch.tensor([[3.0, -5.0, 3.0, 0.0], [3.0, 1.0, 4.0, 3.0]])
    part = sparse.gather(w, w.abs(), 0.5)
    assert part.decode().tolist() == [[3.0, -5.0, 3.0, 0.0], [0.0, 0.0, 4.0, 0.0]]
    assert part.row.tolist() == [0, 3, 4]
    assert part.columns.tolist() == [0, 1, 2, 2]
    kept = pattern.gather(w, w.abs(), 1, 2)
    assert kept.decode().tolist() == [[0.0, -5.0, 3.0, 0.0], [3.0, 0.0, 4.0, 0.0]]
    assert kept.places.tolist() == [[1, 0], [0, 0]]
    assert pattern.gather(torch.zeros(2, 8), torch.zeros(2, 8), 2, 4).places.tolist() == [[0, 1, 0, 1]] * 2
    with pytest.raises(LilliputError, match="NaN"):
        sparse.gather(w, w * float("nan"), 0.5)
    with pytest.raises(ValueError, match="share"):
        sparse.pick(w, w > 0, 0.1)


def test_a_pattern_keeps_what_a_mask_of_its_own_rule_keeps() -> None:
    w = _weight(5, 48)
    dense = w.half().float().view(5, -1, 8)
    mask = torch.zeros_like(dense).scatter_(2, dense.abs().topk(3, dim=2).indices, 1.0)
    assert torch.equal(pattern.gather(w, w.abs(), 3, 8).decode(), (dense * mask).view(5, 48))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (1, 257)])
def test_patterns_that_cannot_be_are_refused(n: int, m: int) -> None:
    with pytest.raises(PlanError, match="pattern"):
        PatternSpec(n, m)


def test_a_pattern_has_to_divide_the_width() -> None:
    with pytest.raises(PlanError, match="does not divide a width of 20"):
        PatternSpec(2, 8).stored(ROWS, WIDTH)


def test_unknown_kinds_are_newer() -> None:
    for plain in ({"kind": "tree"}, {"kind": "rows", "count": 1, "part": {"kind": "tree"}}):
        with pytest.raises(SourceError, match="newer"):
            known.from_plain(plain)


def test_a_scheme_counts_its_transforms_and_refuses_other_parts() -> None:
    w = _weight()
    layer = Layer("x", w).between([Scale(torch.ones(WIDTH).half())], [Rotation("kronecker", 3)])
    whole = layer.with_part(_quantized(layer.rest()), sparse.gather(layer.rest(), layer.rest().abs(), 0.1))
    scheme = of(whole)
    assert from_plain(scheme.plain()) == scheme
    assert scheme.size_bits(ROWS, WIDTH) == WIDTH * 16 + sum(part.bits() for part in whole.parts)
    tensors = {"x.weight" + n: t for n, t in scheme.pack(whole).items()}
    read = decode(LinearSpec("x", "x", ROWS, WIDTH, scheme), tensors.__getitem__)
    torch.testing.assert_close(read, whole.decode(), rtol=0, atol=1e-5)
    assert scheme.integer is None
    assert Scheme((_quantized(w).spec,)).integer == IntegerFormat(3, False, 8)
    with pytest.raises(ValueError, match="was planned as"):
        scheme.pack(layer.with_part(_quantized(w)))
    assert isinstance(whole.parts[1], SparsePart)
