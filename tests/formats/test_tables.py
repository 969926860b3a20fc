import math

import pytest
import torch

from lilliput.formats import tables

VALUES = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(0)) * s for s in (1e-3, 0.1, 3.0, 300.0)])


def test_normal_float_of_four_bits_has_the_published_levels() -> None:
    """QLoRA, appendix E, to the digits printed there."""
    printed = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert tables.normal(4) == pytest.approx(printed, abs=2e-7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_floats_of_any_width(bits: int) -> None:
    levels = tables.normal(bits)
    assert len(levels) == len(set(levels)) == 2**bits
    assert (levels[0], levels[-1], levels.count(0.0)) == (-1.0, 1.0, 1)
    assert sum(x > 0 for x in levels) == 2 ** (bits - 1)


def test_the_dynamic_tree_reads_its_bits() -> None:
    """Every pattern of 8 bits by the rule of the paper: zeros count the exponent, the bits after the first one are
    linear between 0.1 and 1."""

    def value(pattern: str) -> float:
        zeros = len(pattern) - len(pattern.lstrip("0"))
        rest = pattern[zeros + 1 :]
        part = (int(rest, 2) if rest else 0) + 0.5
        return float(10.0**-zeros * (0.1 + 0.9 * part / 2 ** len(rest)))

    patterns = [f"{x:07b}" for x in range(1, 128)]
    wanted = sorted([0.0, 1.0, *(s * value(p) for p in patterns for s in (1, -1))])
    assert tables.dynamic(8) == pytest.approx(wanted, rel=1e-12)
    assert len(set(tables.dynamic(8))) == 256


@pytest.mark.parametrize("bits", range(2, 9))
def test_dynamic_trees_of_any_width(bits: int) -> None:
    """Each value goes to its nearest level, over seven orders of magnitude."""
    levels = tables.dynamic(bits)
    assert len(levels) == len(set(levels)) == 2**bits
    table = tables.of("dynamic", bits)
    x = torch.cat([VALUES * 1e-3, VALUES * 1e-6, VALUES]).clamp(-1, 1)
    distance = (x[:, None] - table.levels).abs()
    chosen = distance.gather(1, table.index(x)[:, None])[:, 0]
    assert torch.allclose(chosen, distance.amin(1), rtol=1e-5, atol=1e-12)


def test_normal_data_fill_the_levels_roughly_evenly() -> None:
    """Of the levels but the outermost and 0's neighbours, none takes more than twice the share of another."""
    x = torch.randn(20000, generator=torch.Generator().manual_seed(1))
    table = tables.of("nf", 4)
    counts = torch.bincount(table.index(x / 1.848), minlength=16)[1:-1]
    assert int(counts.max()) <= 2 * int(counts.min())


@pytest.mark.parametrize(("name", "count", "top", "least"), [
    ("e2m1", 15, 6.0, 0.5), ("e2m3", 63, 7.5, 0.125), ("e3m2", 63, 28.0, 2.0**-4),
    ("e4m3", 253, 448.0, 2.0**-9), ("e5m2", 247, 57344.0, 2.0**-16),
])  # fmt: skip
def test_small_floats_have_the_values_of_their_specification(name: str, count: int, top: float, least: float) -> None:
    values = tables.floats(tables.FLOATS[name])
    assert (len(values), values[-1], values[0]) == (count, top, -top)
    assert min(x for x in values if x > 0) == least
    assert list(values) == sorted(set(values))


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_equal_the_cast(name: str, dtype: torch.dtype) -> None:
    """Every finite pattern, and random values up to the largest, ties of halfway values included."""
    table = tables.of(name, 8)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[torch.isfinite(every)]
    assert set(every.tolist()) == set(table.levels.tolist())
    halfway = (table.levels[1:] + table.levels[:-1]) / 2
    x = torch.cat([VALUES, VALUES * 100, every, halfway]).clamp(-table.top, table.top)
    snapped = x.clone()
    table.snap(snapped)
    assert torch.equal(snapped, x.to(dtype).float())
    assert torch.equal(table.levels[table.index(x)], snapped)


@pytest.mark.parametrize(("name", "bits"), [("e2m1", 4), ("e2m3", 6), ("e3m2", 6), *(("nf", b) for b in range(2, 9))])
def test_the_nearest_level_is_the_nearest(name: str, bits: int) -> None:
    """By distance in float64 to all levels; edges and levels themselves are among the values."""
    table = tables.of(name, bits)
    x = torch.cat([VALUES, table.levels, table.edges[:-1]])
    far = (x.double()[:, None] - table.levels.double()).abs()
    index = table.index(x)
    assert torch.allclose(far.gather(1, index[:, None])[:, 0], far.amin(1), rtol=0, atol=1e-7)
    snapped = x.clone()
    table.snap(snapped)
    assert torch.equal(snapped, table.levels[index])


def test_ties_of_e2m1_go_to_the_even_mantissa() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0])
    tables.of("e2m1", 4).snap(x)
    assert x.tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -4]


def test_levels_too_close_for_cells_are_found_too() -> None:
    table = tables.of("custom", 3, (-1.0, -1e-7, 0.0, 1e-7, 1.0))
    assert table.first is None
    assert table.index(torch.tensor([-2.0, -0.9e-7, 1e-9, 0.6, math.inf])).tolist() == [0, 1, 2, 4, 4]
