import itertools

import pytest
import torch

from lilliput.algebra import compiled, trellis


def test_the_table_holds_the_normal_quantiles_once_each() -> None:
    table = trellis.table(10)
    quantiles = torch.special.ndtri((torch.arange(1024, dtype=torch.float64) + 0.5) / 1024)
    torch.testing.assert_close(table.sort().values.double(), quantiles, atol=2.0**-10, rtol=0)
    assert abs(float(table.square().mean()) - 1) < 0.01
    # Neighbours, whose registers share most bits, have nothing to do with each other.
    assert abs(float((table[:-1] * table[1:]).mean())) < 0.1


@pytest.mark.parametrize("steps", [(1, 1), (2, 2), (1, 2), (2, 3)])
def test_the_path_is_the_best_of_all(steps: tuple[int, int]) -> None:
    """All sequences of bits, tried one by one."""
    length, window = 4, 8
    x = torch.randn(3, length, generator=torch.Generator().manual_seed(0))
    table = trellis.table(window).double()
    best = [float("inf")] * 3
    choices = [range(1 << steps[t % 2]) for t in range(length)]
    for symbols in itertools.product(*choices):
        register, numbers = 0, []
        for t, symbol in enumerate(symbols):
            register = (register << steps[t % 2] | symbol) % (1 << window)
            numbers.append(float(table[register]))
        miss = (x.double() - torch.tensor(numbers, dtype=torch.float64)).square().sum(1).tolist()
        best = [min(a, b) for a, b in zip(best, miss, strict=True)]
    path = trellis.best_path(x, window, steps)
    found = (table[path] - x).square().sum(1)
    torch.testing.assert_close(found, torch.tensor(best, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [(1, 1), (2, 2), (2, 3), (4, 4), (3, 4), (4, 5)])
def test_symbols_say_the_registers(steps: tuple[int, int]) -> None:
    x = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    path = trellis.best_path(x, 9, steps)
    bits = torch.tensor([steps[t % 2] for t in range(30)])
    assert torch.equal(trellis.registers(path & ((1 << bits) - 1), 9, steps), path)


@pytest.mark.parametrize("steps", [(1, 1), (2, 2), (2, 3), (3, 3), (4, 4), (4, 5), (5, 5)])
@pytest.mark.parametrize("shape", [(5, 61), (1, 2), (3, 1), (0, 7)])
def test_compiled_or_not_the_path_is_the_same(steps: tuple[int, int], shape: tuple[int, int]) -> None:
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    x[:1] = 0.5  # many equal costs
    numbers = trellis.table(9)
    assert compiled.available()
    assert torch.equal(compiled.best_path(x, numbers, steps), trellis.in_torch(x, numbers, steps))


@pytest.mark.parametrize(("steps", "most"), [((2, 2), 0.083), ((2, 3), 0.044), ((3, 3), 0.023)])
def test_a_gaussian_source_comes_close_to_the_bound(steps: tuple[int, int], most: float) -> None:
    """Scalar grids of the same bits have 0.117, no such grid, and 0.0345; the bounds are 0.0625, 0.0313 and 0.0156."""
    x = torch.randn(12, 192, generator=torch.Generator().manual_seed(0))
    x = x / x.square().mean().sqrt()
    path = trellis.best_path(x, 12, steps)
    assert 4.0 ** (-sum(steps) / 2) < float((trellis.table(12)[path] - x).square().mean()) < most
