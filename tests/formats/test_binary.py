import itertools

import pytest
import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats import groups, known
from lilliput.formats.binary import BinaryFormat, BinaryGrid, from_target, of_integers
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.linear import LinearSpec, decode
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import quantized
from lilliput.target import Target


def _weight(rows: int = 12, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def _error(form: BinaryFormat, w: Tensor, grid: BinaryGrid, h: Tensor | None = None) -> Tensor:
    """Weighted error of each group, [out, groups]."""
    miss = (form.decode(form.encode(w, grid), grid) - w).square() * (1.0 if h is None else h)
    index = groups.index(w.shape[1], form.group_size).expand_as(w)
    return torch.zeros(len(w), groups.count(w.shape[1], form.group_size)).scatter_add_(1, index, miss)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("size", [-1, 16, 24])
def test_codes_are_the_nearest_of_all_sums(bits: int, size: int) -> None:
    form, w = BinaryFormat(bits, size), _weight()
    grid = form.fit(w, rounds=2)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits))).double()
    sums = (grid.alpha.double() @ signs.T) + grid.offset.double().unsqueeze(-1)  # [out, groups, 2^bits]
    best = (sums[:, groups.index(64, form.group_size)] - w.double().unsqueeze(-1)).abs().amin(-1)
    ours = (form.decode(form.encode(w, grid), grid).double() - w.double()).abs()
    torch.testing.assert_close(ours, best, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_evenly_spaced_levels_are_a_case(bits: int) -> None:
    """alpha_i = S 2^(i-1), z = S ((2^b - 1) / 2 - Z); with scales that are powers of two the sums are exact."""
    integers, form, w = IntegerFormat(bits, False, 16), BinaryFormat(bits, 16, torch.float32), _weight()
    grid = integers.fit(w)
    grid = type(grid)(torch.exp2(torch.round(torch.log2(grid.scale.float()))).half(), grid.zero)
    codes = integers.encode(w, grid)
    assert torch.equal(form.decode(codes, of_integers(integers, grid)), integers.decode(codes, grid))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("start", ["greedy", "uniform", "best"])
def test_no_round_raises_the_error_of_any_group(start: str, weighted: bool) -> None:
    h = torch.rand(64, generator=torch.Generator().manual_seed(3)) ** 4 if weighted else None
    form, w = BinaryFormat(3, 24), _weight()
    errors = [_error(form, w, form.fit(w, importance=h, start=start, rounds=n), h) for n in range(6)]  # type: ignore[arg-type]
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(errors[-1].sum()) < 0.98 * float(errors[0].sum())


def test_importance_decides_where_the_error_goes() -> None:
    h = torch.ones(64)
    h[::4] = 100
    form, w = BinaryFormat(2, -1), _weight()
    plain, weighted = form.fit(w), form.fit(w, importance=h)
    assert float(_error(form, w, weighted, h).sum()) < 0.8 * float(_error(form, w, plain, h).sum())
    same = form.fit(w, importance=h.expand(12, 64).contiguous())
    assert torch.equal(same.alpha, weighted.alpha)


def test_the_best_start_is_no_worse_than_an_integer_grid() -> None:
    integers, form, w = IntegerFormat(3, False, 32), BinaryFormat(3, 32), _weight(24, 128)
    grid = integers.fit(w, search="mse")
    nearest = (integers.decode(integers.encode(w, grid), grid) - w).square().sum()
    assert float(_error(form, w, form.fit(w)).sum()) < 0.9 * float(nearest)


def test_few_values_are_exact() -> None:
    w = torch.tensor([-0.75, -0.25, 0.25, 0.75])[
        torch.randint(0, 4, (6, 40), generator=torch.Generator().manual_seed(1))
    ]
    form = BinaryFormat(2, -1)
    assert torch.equal(form.decode(form.encode(w, form.fit(w)), form.fit(w)), w)
    for constant in (torch.zeros(3, 10), torch.full((3, 10), 0.5)):
        grid = form.fit(constant)
        assert torch.equal(form.decode(form.encode(constant, grid), grid), constant)


@pytest.mark.parametrize(("bits", "size"), [(1, -1), (3, 24), (4, 16), (8, 100)])
def test_bytes_sizes_and_reading(bits: int, size: int) -> None:
    form, w = BinaryFormat(bits, size), _weight(5)
    grid = form.fit(w)
    part = QuantizedPart(form, form.encode(w, grid), grid)
    packed = part.pack()
    assert {n: (t.dtype, tuple(t.shape)) for n, t in packed.items()} == form.stored(5, 64)
    assert part.bits() == 5 * 64 * bits + 5 * groups.count(64, form.group_size) * (bits + 1) * 16
    read = decode(
        LinearSpec("x", "x", 5, 64, quantized(form)), {"x.weight" + n: t for n, t in packed.items()}.__getitem__
    )
    assert torch.equal(read, part.decode())
    assert torch.equal(part.rows(1, 3).decode(), part.decode()[1:3])
    assert known.from_plain(form.plain()) == form
    # bit i of a stored code says the sign of alpha_i
    first = [int(packed[""][0]) >> i & 1 for i in range(min(bits, 8))]
    value = float(grid.offset[0, 0]) + sum(float(a) * (2 * b - 1) for a, b in zip(grid.alpha[0, 0], first, strict=True))
    assert value == pytest.approx(float(part.decode()[0, 0]), abs=1e-6)


def test_bad_formats_and_values_are_refused() -> None:
    for bits, size, dtype in (
        (0, -1, torch.float16),
        (9, -1, torch.float16),
        (2, 0, torch.float16),
        (2, 4, torch.int8),
    ):
        with pytest.raises(PlanError):
            BinaryFormat(bits, size, dtype)
    with pytest.raises(PlanError, match="bits"):
        from_target(Target(format="binary", group_size=16))
    with pytest.raises(PlanError, match="for groups or rows"):
        from_target(Target(format="binary", bits=2, group_size="tensor"))
    assert from_target(Target(format="binary", bits=2, group_size="channel")) == BinaryFormat(2, -1)
    with pytest.raises(LilliputError, match="NaN"):
        BinaryFormat(2, -1).fit(_weight() * float("nan"))
    with pytest.raises(LilliputError, match="float32"):
        BinaryFormat(2, -1).fit(_weight() * 1e9)
    assert bool(torch.isfinite(BinaryFormat(2, -1, torch.float32).fit(_weight() * 1e9).alpha).all())
