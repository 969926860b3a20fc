import pytest
import torch

from lilliput.errors import DataError
from lilliput.metrics.tail import kl_quantile


def test_the_quantile_is_that_of_all_positions() -> None:
    values = torch.arange(1000, dtype=torch.float64).reshape(10, 100)
    found = kl_quantile(values[torch.randperm(10, generator=torch.Generator().manual_seed(0))], 0.95)
    assert found.value == 949.0
    assert found.low < found.value < found.high
    assert kl_quantile(values, 0.95) == kl_quantile(values.flip(0).flip(0), 0.95)


def test_the_interval_covers_the_true_quantile() -> None:
    """Of 200 samples of 8 windows from an exponential distribution whose scale differs by window."""
    generator = torch.Generator().manual_seed(1)
    true = float(kl_quantile(_sample(4000, generator), 0.95).value)
    hits = 0
    for _ in range(200):
        found = kl_quantile(_sample(8, generator), 0.95)
        hits += found.low <= true <= found.high
    assert 178 <= hits <= 200


def _sample(windows: int, generator: torch.Generator) -> torch.Tensor:
    scale = 0.5 + torch.rand(windows, 1, generator=generator)
    return -scale * torch.rand(windows, 200, generator=generator).clamp(min=1e-9).log()


def test_bad_input() -> None:
    with pytest.raises(DataError, match="at least 2 windows"):
        kl_quantile(torch.ones(1, 5), 0.5)
    with pytest.raises(ValueError, match="quantile"):
        kl_quantile(torch.ones(2, 5), 1.0)
