from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats import groups, known
from lilliput.formats.codebook import CodebookFormat, Table, from_target
from lilliput.formats.integer import IntegerFormat
from lilliput.target import Target

SIZES = (-1, 0, 16, 24)  # 24 leaves a last group of 16 of a width of 64


def _weight(rows: int = 12, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize(("bits", "size"), list(itertools.product(range(1, 9), SIZES)))
def test_codes_are_the_nearest_and_survive_packing(bits: int, size: int) -> None:
    form, w = CodebookFormat(bits, size), _weight()
    table = form.fit(w)
    assert table.levels.dtype == torch.float16
    assert table.levels.shape == ((1, 1) if size == 0 else (12, groups.count(64, form.group_size))) + (2**bits,)
    codes = form.encode(w, table)
    assert codes.dtype == torch.int8
    back = form.decode(codes, table)
    levels = form.expand(table, 64).levels.float().expand(12, -1, -1)[:, groups.index(64, form.group_size)]
    miss = (levels - w[:, :, None]).abs().min(2).values
    torch.testing.assert_close((back - w).abs(), miss, rtol=0, atol=0)
    tensors = form.pack(codes, table)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == form.stored(12, 64)
    assert 8 * sum(t.numel() * t.element_size() for t in tensors.values()) == form.size_bits(12, 64)
    read = form.unpack(tensors.__getitem__, 12, 64, 3, 7)
    assert torch.equal(form.decode(*read), back[3:7])
    again = known.from_plain(form.plain())
    assert again == form
    assert again.describe() == form.describe()


@pytest.mark.parametrize("size", SIZES)
def test_uniform_levels_are_an_integer_grid(size: int) -> None:
    """Levels on an integer grid's values reproduce it, bit for bit but for ties between two levels."""
    whole, w = IntegerFormat(3, False, size, torch.float32), _weight()
    grid = whole.fit(w)
    assert grid.zero is not None
    steps = torch.arange(-4, 4).float()
    form = CodebookFormat(3, size, torch.float32)
    table = form.table((steps - grid.zero[..., None].float()) * grid.scale[..., None])
    got, want = (f.decode(f.encode(w, g), g) for f, g in ((form, table), (whole, grid)))
    assert float((got != want).float().mean()) < 0.002
    torch.testing.assert_close((got - w).abs(), (want - w).abs(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("size", SIZES)
def test_as_many_levels_as_values_are_exact(size: int) -> None:
    values = torch.tensor([-1.5, 0.0, 0.25, 3.0])
    w = values[torch.randint(0, 4, (12, 64), generator=torch.Generator().manual_seed(0))]
    form = CodebookFormat(2, size)
    table = form.fit(w)
    assert torch.equal(form.decode(form.encode(w, table), table), w)


def test_levels_follow_the_importance_and_zero_is_kept_for_holes() -> None:
    form, w = CodebookFormat(2, -1, torch.float32), _weight()
    importance = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) ** 4

    def error(table: Table, by: Tensor) -> float:
        return float(((form.decode(form.encode(w, table), table) - w).square() * by).sum())

    assert error(form.fit(w, importance=importance), importance) < 0.9 * error(form.fit(w), importance)
    assert error(form.fit(w), torch.ones_like(w)) < error(form.fit(w, importance=importance), torch.ones_like(w))
    holes = torch.zeros_like(w, dtype=torch.bool)
    holes[::2, 5] = True
    assert torch.equal((form.fit(w, zero=holes).levels == 0).any(-1).any(-1), holes.any(1))


def test_bad_settings_are_refused() -> None:
    for given, match in (((0, -1), "0 bits"), ((9, -1), "9 bits"), ((4, -2), "group size -2")):
        with pytest.raises(PlanError, match=match):
            CodebookFormat(*given)
    with pytest.raises(PlanError, match=r"levels in torch\.int8"):
        CodebookFormat(4, -1, torch.int8)
    with pytest.raises(PlanError, match=r"16 levels for every 8 weights: .* at most 3 bits"):
        CodebookFormat(4, 8).check(4, 64)
    CodebookFormat(4, 0).check(4, 8)
    # A table for a whole matrix is fitted to all of it at once; rows are taken few at a time.
    assert CodebookFormat(4, 0).cost(4096, 4096).ram > 100 * CodebookFormat(4, -1).cost(4096, 4096).ram
    with pytest.raises(PlanError, match=r"target\.format"):
        from_target(Target(bits=4, group_size=16))
    with pytest.raises(PlanError, match=r"target\.bits"):
        from_target(Target(format="codebook", group_size=16))
    with pytest.raises(PlanError, match="Did you mean 'codebook'"):
        known.from_target(Target(format="codebok", bits=4, group_size=16))
    with pytest.raises(LilliputError, match="exceeds the range of float16"):
        CodebookFormat(2, -1).fit(_weight() * 1e8)
