import itertools

import pytest
import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats.integer import IntegerFormat, IntegerGrid, from_target
from lilliput.target import Target

SIZES = (-1, 0, 16, 24)  # 24 leaves a last group of 16 of a width of 64


def _weight(rows: int = 12, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def _round_trip(form: IntegerFormat, w: Tensor, grid: IntegerGrid) -> Tensor:
    return form.decode(form.encode(w, grid), grid)


@pytest.mark.parametrize(("bits", "symmetric", "size"), list(itertools.product(range(2, 9), (True, False), SIZES)))
def test_min_max_errs_by_half_a_step_at_most(bits: int, symmetric: bool, size: int) -> None:
    form, w = IntegerFormat(bits, symmetric, size, torch.float32), _weight()
    grid = form.fit(w)
    codes = form.encode(w, grid)
    assert codes.dtype == torch.int8
    assert int(codes.min()) >= form.lowest
    assert int(codes.max()) <= form.highest
    step, zero = form.expand(grid, 64)
    # A zero point rounds by at most half a step too, so an end of an asymmetric range may lie one step off.
    room = 0.5 if symmetric else 1.0
    assert bool(((form.decode(codes, grid) - w).abs() <= step * room * 1.0001).all())
    torch.testing.assert_close(form.decode(codes, grid), (codes.float() - zero) * step, atol=0, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_on_the_grid_stay(symmetric: bool, size: int) -> None:
    form, w = IntegerFormat(4, symmetric, size), _weight()
    grid = form.fit(w, search="mse")
    once = _round_trip(form, w, grid)
    assert torch.equal(_round_trip(form, once, grid), once)


@pytest.mark.parametrize("form", [IntegerFormat(3, s, g) for s in (True, False) for g in SIZES])
def test_search_is_never_worse_than_min_max(form: IntegerFormat) -> None:
    w = _weight(seed=1)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(2)) ** 4
    for weigh in (None, importance, importance.expand(12, 64).contiguous()):

        def error(grid: IntegerGrid, by: Tensor | None = weigh) -> Tensor:
            miss = (_round_trip(form, w, grid) - w).square() * (1.0 if by is None else by)
            if form.group_size == 0:
                return miss.sum()
            index = form.group_of(64).expand(12, 64)
            return torch.zeros(12, form.groups(64)).scatter_add_(1, index, miss)

        plain, searched = error(form.fit(w)), error(form.fit(w, search="mse", importance=weigh))
        assert bool((searched <= plain * (1 + 1e-5) + 1e-12).all())
        assert float(searched.sum()) < float(plain.sum())


def test_the_search_comes_close_to_trying_everything() -> None:
    """Within 2 % of the best of 400 scales times all zero points, summed over units."""
    w = _weight(24, 32, seed=5)
    for symmetric in (True, False):
        form = IntegerFormat(3, symmetric, -1, torch.float32)
        ours = (_round_trip(form, w, form.fit(w, search="mse")) - w).square().sum(1)
        best = torch.full((24,), 1e9)
        top = w.abs().amax(1, keepdim=True)
        for share in torch.linspace(0.05, 0.5, 400):
            for zero in (0,) if symmetric else range(-4, 4):
                codes = (torch.round(w / (top * share)) + zero).clamp(-4, 3)
                best = torch.minimum(best, ((codes - zero) * top * share - w).square().sum(1))
        assert float(ours.sum()) <= 1.02 * float(best.sum())


def test_a_negative_scale_helps_where_the_top_is_longer() -> None:
    w = torch.cat([torch.linspace(-3, 3.9, 64), torch.linspace(-3.9, 3, 64)]).view(2, 64)
    form = IntegerFormat(3, True, -1)
    signed = form.fit(w, search="mse", signed_scale=True)
    assert signed.scale.sign().flatten().tolist() == [-1.0, 1.0]
    plain = form.fit(w, search="mse")
    assert bool((plain.scale > 0).all())
    better, worse = (_round_trip(form, w, g).sub(w).square().sum() for g in (signed, plain))
    assert float(better) < float(worse)


@pytest.mark.parametrize("symmetric", [True, False])
def test_group_as_wide_as_a_row_equals_one_per_row(symmetric: bool) -> None:
    w = _weight()
    a, b = (IntegerFormat(4, symmetric, g).fit(w, search="mse") for g in (64, -1))
    c = IntegerFormat(4, symmetric, 1000).fit(w, search="mse")
    for other in (b, c):
        assert torch.equal(a.scale, other.scale)
        assert symmetric or torch.equal(a.zero, other.zero)  # type: ignore[arg-type]


def test_rows_of_a_grid_decode_alone() -> None:
    for size in SIZES:
        form, w = IntegerFormat(4, False, size), _weight()
        grid = form.fit(w)
        codes = form.encode(w, grid)
        assert torch.equal(form.decode(codes[3:7], grid.rows(3, 7)), form.decode(codes, grid)[3:7])


@pytest.mark.parametrize("form", [IntegerFormat(4, s, g) for s in (True, False) for g in SIZES])
def test_zeros_stay_zero(form: IntegerFormat) -> None:
    w = _weight()
    w[:, :24] = 0
    w[3] = 0
    for search in ("minmax", "mse"):
        grid = form.fit(w, search=search)  # type: ignore[arg-type]
        back = _round_trip(form, w, grid)
        assert bool(torch.isfinite(back).all())
        assert bool((back[w == 0] == 0).all())
    nothing = form.fit(torch.zeros(12, 64), search="mse", signed_scale=True)
    assert bool((nothing.scale == 1).all())


def test_the_step_is_the_one_that_is_stored() -> None:
    w = _weight()
    grid = IntegerFormat(4, True, 16).fit(w)
    assert grid.scale.dtype == torch.float16
    want = (w.view(12, 4, 16).abs().amax(2) / 7).half()
    assert torch.equal(grid.scale, want)
    assert torch.equal(IntegerFormat(4, True, 16).encode(w, grid), _by_hand(w, want.float()))


def _by_hand(w: Tensor, scale: Tensor) -> Tensor:
    inverse = (1 / scale).repeat_interleave(16, 1)
    return torch.round(w * inverse).clamp(-8, 7).to(torch.int8)


def test_scales_that_a_half_cannot_hold() -> None:
    form = IntegerFormat(4, True, -1)
    with pytest.raises(LilliputError, match="scale_dtype to float32"):
        form.fit(_weight() * 1e8)
    big = IntegerFormat(4, True, -1, torch.float32)
    w = _weight() * 1e8
    assert float((_round_trip(big, w, big.fit(w)) - w).abs().max() / w.abs().max()) < 0.1
    for factor in (1e-4, 1e-6, 1e-12):  # 1e-4: subnormal scales still work; below them everything becomes 0
        w = _weight() * factor
        grid = form.fit(w, search="mse")
        assert float(grid.scale.min()) > 0
        miss = _round_trip(form, w, grid) - w
        assert float(miss.abs().max()) <= max(0.2 * float(w.abs().max()), 2.0**-24)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("size", SIZES)
def test_values_that_are_not_numbers_are_refused(value: float, size: int) -> None:
    w = _weight()
    w[4, 60] = value
    for symmetric, search in itertools.product((True, False), ("minmax", "mse")):
        with pytest.raises(LilliputError, match="1 values that are NaN or infinite"):
            IntegerFormat(4, symmetric, size).fit(w, search=search)  # type: ignore[arg-type]
    with pytest.raises(LilliputError, match="importance"):
        IntegerFormat(4, True, size).fit(_weight(), search="mse", importance=w[4])


def test_sizes_in_bits() -> None:
    assert IntegerFormat(4, True, 32).size_bits(10, 100) == 4000 + 10 * 4 * 16
    assert IntegerFormat(4, False, 32).size_bits(10, 100) == 4000 + 10 * 4 * 20
    assert IntegerFormat(3, True, -1, torch.float32).size_bits(10, 100) == 3000 + 10 * 32
    assert IntegerFormat(8, False, 0).size_bits(10, 100) == 8000 + 16 + 8


def test_names() -> None:
    assert IntegerFormat(4, False, 64).describe() == "int4 g64 asym"
    assert IntegerFormat(8, True, -1).describe() == "int8 row sym"
    assert IntegerFormat(2, True, 0).describe() == "int2 tensor sym"


def test_from_target() -> None:
    made = from_target(Target(bits=4, group_size=64, symmetric=False, scale_dtype="bfloat16"))
    assert made == IntegerFormat(4, False, 64, torch.bfloat16)
    assert from_target(Target(bits=4, group_size="channel")).group_size == -1
    assert from_target(Target(bits=4, group_size="tensor")).group_size == 0
    assert from_target(Target(bits=4, group_size=32, scale_dtype="float32")).scale_dtype == torch.float32
    with pytest.raises(PlanError, match="bits"):
        from_target(Target(group_size=64))
    with pytest.raises(PlanError, match="auto"):
        from_target(Target(bits=4))


def test_bad_formats_are_refused() -> None:
    for bits, size, dtype in (
        (1, 32, torch.float16),
        (9, 32, torch.float16),
        (4, -2, torch.float16),
        (4, 1, torch.int8),
    ):
        with pytest.raises(PlanError):
            IntegerFormat(bits, True, size, dtype)
    with pytest.raises(ValueError, match="importance"):
        IntegerFormat(4, True, 16).fit(_weight(), importance=torch.ones(63))
