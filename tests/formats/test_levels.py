from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats import known, level_search, scales, tables
from lilliput.formats.levels import PRESETS, LevelFormat
from lilliput.target import Target

NAMES = sorted(PRESETS)


def _weight(rows: int = 12, width: int = 80, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=g) * torch.exp(torch.randn(rows, 1, generator=g)) * 0.05


def _form(name: str, **more: Any) -> LevelFormat:
    made = known.from_target(known.completed(Target(format=name, **more)))
    assert isinstance(made, LevelFormat)
    return made


def _loss(form: LevelFormat, w: Tensor, importance: Tensor | None = None, **more: Any) -> Tensor:
    grid = form.fit(w, importance=importance, **more)
    miss = (form.decode(form.encode(w, grid), grid) - w).double().square()
    return miss if importance is None else miss * importance


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_what_is_packed_is_what_was_promised_and_reads_back(name: str, search: Any) -> None:
    """80 inputs: the last group of 32 or 64 is shorter."""
    form, w = _form(name), _weight()
    grid = form.fit(w, search=search)
    codes = form.encode(w, grid)
    packed = form.pack(codes, grid)
    assert {k: (x.dtype, tuple(x.shape)) for k, x in packed.items()} == form.stored(12, 80)
    again = known.from_plain(form.plain())
    assert again == form
    assert again.describe() == form.describe()
    for a, b in ((0, 12), (3, 8)):
        back = again.decode(*again.unpack(packed.__getitem__, 12, 80, a, b))
        assert torch.equal(back, form.decode(codes, grid)[a:b])
    assert 8 * sum(x.numel() * x.element_size() for x in packed.values()) == form.size_bits(12, 80)


@pytest.mark.parametrize("name", NAMES)
def test_values_on_the_grid_stay_and_zero_is_zero(name: str) -> None:
    form, w = _form(name), _weight()
    w[:, 7], w[3] = 0, 0
    grid = form.fit(w)
    back = form.decode(form.encode(w, grid), grid)
    assert torch.equal(form.decode(form.encode(back, grid), grid), back)
    assert not bool(back[:, 7].any())
    assert not bool(back[3].any())


@pytest.mark.parametrize("name", ["nf4", "fp4", "fp8", "nf2"])
def test_each_weight_goes_to_the_nearest_level(name: str) -> None:
    """Slowly, in float64, from the scales as stored; a tie may fall either way."""
    form, w = _form(name, scale_dtype="float32"), _weight()
    grid = form.fit(w)
    back = form.decode(form.encode(w, grid), grid).double()
    scale = grid.values().double()[:, torch.arange(80) // (form.group_size if form.group_size > 0 else 80)]
    levels = form.on(w).levels.double()
    nearest = (w.double()[..., None] - scale[..., None] * levels).abs().amin(-1)
    torch.testing.assert_close((w - back).abs(), nearest, rtol=0, atol=5e-8)
    assert bool((w.abs().amax(1) <= (back.abs().amax(1) * 1.0001 + 1e-9)).all())  # the largest is met


def test_microscaling_blocks_equal_their_definition() -> None:
    """OCP MX 1.0, section 6.3: X = 2^(floor(log2 max|V|) - emax), P = round to nearest even of V / X, saturating."""
    w = _weight(6, 64)
    for name, dtype, emax, top in (
        ("mxfp8", torch.float8_e4m3fn, 8, 448.0),
        ("mxfp8-e5m2", torch.float8_e5m2, 15, 57344.0),
    ):
        form = _form(name)
        grid = form.fit(w)
        block = w.view(6, 2, 32)
        x = 2.0 ** (torch.floor(torch.log2(block.abs().amax(-1, keepdim=True))) - emax)
        want = (block / x).clamp(-top, top).to(dtype).float() * x
        assert torch.equal(form.decode(form.encode(w, grid), grid), want.view(6, 64))
    form = _form("mxfp4")
    grid = form.fit(w)
    assert torch.equal(grid.values(), 2.0 ** (torch.floor(torch.log2(w.view(6, 2, 32).abs().amax(-1))) - 2))


@pytest.mark.parametrize("name", NAMES)
def test_search_is_never_worse_than_covering(name: str) -> None:
    """By group; where groups share what the search changes, by row (none of these formats does)."""
    form = _form(name)
    weighed = level_search.Weighed(_weight(), form.group_size, None)
    table = form.on(weighed.weight)
    plain, searched = (
        level_search.error(weighed, table, form.fit(weighed.weight, search=s).values()) for s in ("minmax", "mse")
    )
    assert bool((searched <= plain * (1 + 1e-6)).all())
    assert float(searched.sum()) < float(plain.sum())


@pytest.mark.parametrize("kind", ["float16", "e8m0", "e4m3", "int8/16", "int5/row", "int3/4"])
def test_importance_moves_the_scales_where_it_counts(kind: str) -> None:
    form, w = _form("nf3", group_size=16, scale_dtype=kind), _weight()
    importance = torch.linspace(0.01, 1, 80).square()
    weighted = _loss(form, w, importance, search="mse").sum()
    grid = form.fit(w, search="mse")
    plain = ((form.decode(form.encode(w, grid), grid) - w).double().square() * importance).sum()
    assert float(weighted) < float(plain)
    even = form.fit(w, search="mse", importance=torch.full((80,), 3.0))
    assert torch.equal(even.values(), grid.values())


def test_normal_weights_prefer_normal_levels() -> None:
    """On normal data nf4 loses less than e2m1 with the same groups and scales, and both less than nf3."""
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    losses = [float(_loss(_form(n, group_size=64), w).sum()) for n in ("nf4", "e2m1", "nf3")]
    assert losses == sorted(losses)


def test_sizes() -> None:
    assert _form("nf4").size_bits(10, 128) == 10 * (128 * 4 + 2 * 16)
    assert _form("mxfp4").size_bits(10, 128) == 10 * (128 * 4 + 4 * 8)
    assert _form("nvfp4").size_bits(10, 128) == 10 * (128 * 4 + 8 * 8) + 32
    assert _form("fp8").size_bits(10, 128) == 10 * (128 * 8 + 32)
    assert _form("mxfp6").size_bits(10, 100) == 10 * (100 * 6 + 4 * 8)
    assert _form("nf3", group_size="tensor").size_bits(10, 100) == 3000 + 16


@pytest.mark.parametrize("size", ["tensor", "channel", 1, 7, 200])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 50)])
def test_odd_shapes(size: Any, shape: tuple[int, int]) -> None:
    form = _form("nf4", group_size=size)
    for w in (_weight(*shape), torch.full(shape, 0.25), torch.zeros(shape)):
        for search in ("minmax", "mse"):
            grid = form.fit(w, search=search)  # type: ignore[arg-type]
            back = form.decode(form.encode(w, grid), grid)
            assert bool(torch.isfinite(back).all())
            assert float(back.abs().max()) <= 1.01 * float(w.abs().max())


def test_custom_levels() -> None:
    levels = (-1.0, -0.25, 0.0, 0.5)
    form = LevelFormat("custom", 2, 8, scales.parse("float32"), levels)
    w = torch.tensor([[-3.0, -0.75, 0.0, 1.5, 0.0, 0.0, 0.0, 0.0]])
    grid = form.fit(w)
    assert torch.equal(form.decode(form.encode(w, grid), grid), w)
    assert known.from_plain(form.plain()) == form
    for wrong in ((-1.0, 1.0), (0.0, 1.0), (-1.0, 0.5, 0.0), (-2.0, -1.0, 0.0, 1.0, 2.0)):
        with pytest.raises(PlanError, match="levels"):
            LevelFormat("custom", 2, 8, scales.parse("float32"), wrong)


@pytest.mark.parametrize(("target", "said"), [
    ({"format": "nf4", "bits": 3}, "'nf4' has 4 bits"), ({"format": "fp8", "bits": 4}, "has 8 bits"),
    ({"format": "nvfp4", "group_size": 32}, "groups of 16"), ({"format": "mxfp4", "scale_dtype": "float16"}, "e8m0"),
    ({"format": "mxfp4", "group_size": 64}, "groups of 32"), ({"format": "nf4", "symmetric": False}, "no zero points"),
    ({"format": "nf4", "group_size": "tensor", "scale_dtype": "e4m3"}, "one scale per tensor"),
    ({"format": "nf4", "group_size": "channel", "scale_dtype": "int3/16"}, "one scale per row"),
    ({"format": "nf5"}, "Did you mean 'nf"), ({"format": "mxfp5"}, "Did you mean 'mxfp"),
])  # fmt: skip
def test_targets_that_contradict_their_format_are_refused(target: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        known.from_target(known.completed(Target(**target)))


def test_names_fix_what_they_say() -> None:
    for name, preset in PRESETS.items():
        full = known.completed(Target(format=name))
        assert full.bits == (preset.bits or 4)
        assert full.group_size == preset.group
    assert _form("nf", bits=6).on(torch.zeros(1)).levels.tolist() == pytest.approx(tables.normal(6))
    assert known.completed(Target()) == Target()


@pytest.mark.parametrize("name", ["nf4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(name: str, value: float) -> None:
    w = _weight()
    w[2, 3] = value
    for search in ("minmax", "mse"):
        with pytest.raises(LilliputError, match="1 values that are NaN or infinite"):
            _form(name).fit(w, search=search)  # type: ignore[arg-type]
    with pytest.raises(LilliputError, match="importance"):
        _form(name).fit(_weight(), search="mse", importance=w[2])
    with pytest.raises(LilliputError, match="scale_dtype to float32"):
        _form("nf4").fit(_weight() * 1e9)
