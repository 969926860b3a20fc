from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError, SourceError
from lilliput.formats import scales
from lilliput.formats.scales import Scales

NAMES = (
    "float16",
    "bfloat16",
    "float32",
    "e8m0",
    "e4m3",
    "int8/256",
    "int8/7",
    "int4/row",
    "int6/row",
    "int3/16",
    "int2/4",
)


def _peak(rows: int = 6, groups: int = 9, seed: int = 0) -> Tensor:
    return torch.rand(rows, groups, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.01


def _settled(name: str, peak: Tensor, top: float = 7.0) -> Scales:
    kind = scales.parse(name)
    second = kind.second(peak, top)
    return Scales(kind, kind.coded(peak, top, second), second)


def _getter(tensors: dict[str, Tensor]) -> Callable[[str], Tensor]:
    return lambda suffix: tensors[suffix]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("groups", [1, 5, 16, 37])
def test_what_is_packed_is_what_was_promised_and_reads_back(name: str, groups: int) -> None:
    held = _settled(name, _peak(6, groups))
    packed = held.kind.pack(held.codes, held.second)
    assert {k: (x.dtype, tuple(x.shape)) for k, x in packed.items()} == held.kind.stored(6, groups)
    for a, b in ((0, 6), (2, 5), (5, 6)):
        back = scales.unpack(held.kind, _getter({f"_scale{k}": x for k, x in packed.items()}), (6, groups), a, b)
        assert torch.equal(back.values(), held.values()[a:b])
    bytes_held = sum(x.numel() * x.element_size() for x in packed.values())
    assert 0 <= 8 * bytes_held - held.kind.size_bits(6, groups) < 8 * 6  # rows of codes end with whole bytes
    assert scales.from_plain(held.kind.name) == held.kind


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("int8/")])
def test_rows_can_be_cut(name: str) -> None:
    held = _settled(name, _peak())
    assert torch.equal(held.rows(2, 4).values(), held.values()[2:4])


def test_blocks_over_rows_cannot_be_cut() -> None:
    assert scales.joins_rows("int8/256")
    assert not scales.joins_rows("int3/16")
    with pytest.raises(ValueError, match="cannot be cut"):
        _settled("int8/256", _peak()).rows(1, 2)


@pytest.mark.parametrize(("name", "bound"), [
    ("float16", 5e-4), ("float32", 2e-7), ("e4m3", 0.0626), ("int8/256", 0.02), ("int8/row", 0.05), ("int6/16", 0.02),
])  # fmt: skip
def test_scales_keep_their_value_to_the_precision_of_the_kind(name: str, bound: float) -> None:
    """Relative; the stored form has half a step of error, and steps are shares of the block's range."""
    peak = _peak() + 0.05
    assert float((_settled(name, peak).values() * 7 / peak - 1).abs().max()) <= bound


def test_powers_are_exact_and_follow_the_microscaling_rule() -> None:
    """X = 2^(floor(log2 max) - emax), emax the exponent of the largest level: 2 for 6, 8 for 448, 15 for 57344."""
    peak = torch.tensor([[1.0, 2.0**-10, 0.99999994, 3.9999998, 7.0, 2.0**-120, 1e30]])
    for top, exponent in ((6.0, 2), (28.0, 4), (448.0, 8), (57344.0, 15), (7.5, 2), (1.0, 0)):
        values = _settled("e8m0", peak, top).values()
        mantissa, _ = torch.frexp(values)
        assert bool((mantissa == 0.5).all())
        wanted = [max(2.0 ** (e - exponent), 2.0**-126) for e in (0, -10, -1, 1, 2, -120, 99)]
        assert values.tolist()[0] == wanted
    assert _settled("e8m0", torch.zeros(1, 2)).values().tolist() == [[1.0, 1.0]]


def test_small_floats_under_a_float_of_the_matrix() -> None:
    """The largest scale becomes 448 and all are what a cast of the quotient gives."""
    peak = _peak()
    held = _settled("e4m3", peak, 6.0)
    divisor = held.second[0]
    assert float(divisor) == pytest.approx(448 * 6 / float(peak.max()), rel=1e-6)
    assert int(held.codes.max()) == 126
    assert torch.equal(held.values(), (peak / 6 * divisor).clamp(max=448).to(torch.float8_e4m3fn).float() / divisor)


def test_double_quantization_as_printed() -> None:
    """Scales less their mean, in 8 bits by the largest of each block; overhead 8/64 + 32/(64 * 256) bits a weight."""
    peak = _peak(8, 100)
    held = _settled("int8/256", peak, 1.0)
    flat, mean = peak.reshape(-1), peak.double().mean()
    want = torch.empty(800)
    for a in range(0, 800, 256):
        away = flat[a : a + 256].double() - mean
        step = away.abs().max() / 127
        want[a : a + 256] = (mean + torch.round(away / step) * step).float()
    torch.testing.assert_close(held.values().reshape(-1), want, rtol=0, atol=1e-7)
    size = held.kind.size_bits(4096, 64)
    assert size == 4096 * 64 * 8 + 1024 * 32 + 32
    assert size / (4096 * 4096) == pytest.approx(8 / 64 + 32 / (64 * 256), abs=1e-5)


def test_integer_scales_of_a_row_are_multiples_of_its_step() -> None:
    held = _settled("int4/row", _peak())
    multiple = held.values() / held.second[0]
    torch.testing.assert_close(multiple, multiple.round(), rtol=1e-6, atol=0)
    multiple = multiple.round()
    assert (int(multiple.min()) >= 1, int(multiple.max())) == (True, 16)


def test_blocks_of_groups_span_their_range() -> None:
    """16 groups share a step and an offset: their smallest and largest are met, to the precision of a half."""
    peak = _peak(3, 40)
    held = _settled("int3/16", peak, 1.0)
    for a in (0, 16, 32):
        some, values = peak[:, a : a + 16], held.values()[:, a : a + 16]
        torch.testing.assert_close(values.amin(1), some.amin(1), rtol=2e-3, atol=0)
        torch.testing.assert_close(values.amax(1), some.amax(1), rtol=2e-3, atol=0)
        step = (some.amax(1) - some.amin(1)) / 7
        assert bool(((values - some).abs() <= step[:, None] * 0.51).all())
    assert held.kind.size_bits(10, 40) == 10 * 40 * 3 + 10 * 3 * 32


@pytest.mark.parametrize("name", [n for n in NAMES if "float" not in n])
def test_empty_groups_leave_positive_scales_and_do_not_spoil_others(name: str) -> None:
    peak = _peak(4, 16)
    full = _settled(name, peak)
    holes = peak.clone()
    holes[1, 3], holes[2] = 0, 0
    held = _settled(name, holes)
    assert bool((held.values() > 0).all())
    if held.kind.shared != "matrix":
        assert torch.equal(held.values()[0], full.values()[0])


@pytest.mark.parametrize("name", ["e8m0", "e4m3", "int8/256", "int4/row", "int3/16"])
def test_a_search_never_loses_to_covering(name: str) -> None:
    """Distance to wanted scales as the error: each kind ends at the nearest value it has, or no farther than it was."""
    kind, cover = scales.parse(name), _peak()
    wanted = cover * 0.8
    start = Scales(kind, kind.coded(cover, 1.0, shared := kind.second(cover, 1.0)), shared)
    found = scales.choose(kind, cover, wanted, 1.0, lambda s: (s - wanted).square())
    before, after = ((x.values() - wanted).square().sum(1) for x in (start, found))
    assert bool((after <= before).all())
    assert float(after.sum()) < float(before.sum())


@pytest.mark.parametrize(("name", "said"), [
    ("e8m1", "Did you mean 'e8m0'"), ("float8", "Did you mean 'float"), ("int9/row", "nearest is int8/row"),
    ("int3/1", "nearest is int3/2"), ("int1/16", "nearest is int2/16"),
])  # fmt: skip
def test_nonsense_is_refused_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        scales.parse(name)
    with pytest.raises(SourceError, match="newer"):
        scales.from_plain(name)
