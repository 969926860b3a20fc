import itertools

import pytest
import torch

from lilliput.algebra import compiled, e8


def test_the_table_is_65536_points_of_the_shifted_lattice() -> None:
    table = e8.table()
    assert table.shape == (1 << 16, 8)
    assert len(table.unique(dim=0)) == 1 << 16
    for index, shift in ((0, 0.25), (1, -0.25)):
        points = table[index::2] - shift
        assert bool(((2 * points).remainder(2) == 1).all())  # halves of odd numbers
        assert bool((points.sum(1).remainder(2) == 0).all())
        assert float(points.square().sum(1).max()) == 12.0
    # Every point of norm up to 10 is there, for each shift: 2^7 sign patterns for each of 227.
    assert int((((table[0::2] - 0.25).square().sum(1)) <= 10).sum()) == 227 << 7


def test_patterns_are_all_short_ones_of_the_definition() -> None:
    known = {tuple(x) for x in e8.patterns().tolist()}
    assert len(known) == 256
    short = {p for p in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in p) <= 10}
    assert short < known


def test_the_nearest_point_is_the_nearest_of_all() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(60, 8, generator=g) * s for s in (0.1, 1.0, 5.0)])
    away = torch.cdist(x.double(), e8.table().double())
    found = away.gather(1, e8.nearest(x)[:, None])[:, 0]
    torch.testing.assert_close(found, away.amin(1), atol=1e-6, rtol=0)
    assert torch.equal(e8.nearest(e8.table()[::97]), torch.arange(0, 1 << 16, 97))


@pytest.mark.parametrize("count", [0, 1, 63, 200])
def test_compiled_or_not_the_points_are_the_same(count: int) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, 8, generator=g) * torch.rand(count, 1, generator=g) * 4
    x[: count // 4] = (x[: count // 4] * 4).round() / 4  # many equal distances
    assert compiled.available()
    assert torch.equal(compiled.nearest_e8(x, e8.patterns()), e8.in_torch(x, e8.patterns()))


def test_a_gaussian_source_has_the_papers_error() -> None:
    """QuIP# states 0.089 at its scale; a scalar grid of 4 levels has 0.117."""
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))

    def error(spread: float) -> float:
        return float((e8.table()[e8.nearest(x * spread)] / spread - x).square().mean())

    assert 0.089 < error(e8.SPREAD) < 0.0925
    assert error(e8.SPREAD) < min(error(e8.SPREAD * 0.95), error(e8.SPREAD * 1.05))
