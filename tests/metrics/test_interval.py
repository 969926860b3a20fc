import math

import pytest
import torch

from lilliput.errors import DataError
from lilliput.metrics.agreement import agreement
from lilliput.metrics.interval import Interval, exp_interval, mean_interval, t_quantile
from lilliput.metrics.kl import kl
from lilliput.metrics.perplexity import perplexity
from lilliput.metrics.perplexity_ratio import perplexity_ratio

# Two-sided quantiles from printed tables.
TABLE = {
    (1, 0.95): 12.7062047,
    (2, 0.95): 4.3026527,
    (3, 0.95): 3.1824463,
    (4, 0.95): 2.7764451,
    (7, 0.95): 2.3646243,
    (10, 0.95): 2.2281389,
    (15, 0.95): 2.1314495,
    (30, 0.95): 2.0422725,
    (120, 0.95): 1.9799304,
    (5, 0.99): 4.0321430,
    (8, 0.90): 1.8595480,
    (1, 0.50): 1.0,
}


@pytest.mark.parametrize(("dof", "level"), TABLE)
def test_quantiles_are_those_of_the_tables(dof, level):
    assert t_quantile(dof, level) == pytest.approx(TABLE[dof, level], abs=1e-6)


def test_quantile_tends_to_the_normal_one():
    assert t_quantile(20_000) == pytest.approx(1.9600, abs=2e-4)
    with pytest.raises(ValueError, match="no quantile"):
        t_quantile(0)


@pytest.mark.parametrize("windows", [2, 4, 8])
def test_coverage_with_few_windows(windows):
    runs = torch.randn(4_000, windows, generator=torch.Generator().manual_seed(windows), dtype=torch.float64) + 3.0
    intervals = [mean_interval(run) for run in runs]
    covered = sum(x.low <= 3.0 <= x.high for x in intervals) / len(intervals)
    assert abs(covered - 0.95) < 0.011  # three standard errors


def test_coverage_of_the_ratio_of_noisy_perplexities():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(1_500):
        hard = 3 + torch.randn(8, 1, generator=generator)
        own = hard + 0.1 * torch.randn(8, 20, generator=generator)
        other = hard + math.log(1.05) + 0.1 * torch.randn(8, 20, generator=generator)
        found = perplexity_ratio(other, own)
        assert found.high - found.low < 0.2  # what both windows share must not widen it
        hits += found.low <= 1.05 <= found.high
    assert abs(hits / 1_500 - 0.95) < 0.017


def test_mean_interval_by_hand():
    found = mean_interval(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    half = 3.1824463 * math.sqrt(14 / 3) / 2
    assert found.value == 3.0
    assert found.high - found.value == pytest.approx(half, abs=1e-6)
    assert found.value - found.low == pytest.approx(half, abs=1e-6)


def test_log_scale_is_asymmetric_and_positive():
    found = exp_interval(torch.tensor([0.0, 4.0]))
    assert found.value == pytest.approx(math.exp(2))
    assert 0 < found.low < found.value < found.high
    assert found.low * found.high == pytest.approx(found.value**2)
    assert math.isfinite(exp_interval(torch.tensor([1.0, 1e6])).high)


def test_metrics_by_hand():
    nll = torch.tensor([[1.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    assert perplexity(nll) == Interval(math.exp(2), math.exp(2), math.exp(2))
    assert perplexity_ratio(nll + 1, nll).value == pytest.approx(math.e)
    same = torch.tensor([[True, True, False, True], [True, True, True, True]])
    assert agreement(same).value == 0.875
    assert agreement(same).high == 1.0
    assert agreement(same).low == 0.0
    assert kl(torch.tensor([[0.0, 0.1], [0.3, 0.4]])).low == 0.0
    assert kl(torch.tensor([[0.0, 0.1], [0.3, 0.4]])).value == pytest.approx(0.2)
    assert perplexity(torch.tensor([[0.0], [2.0]])).low == 1.0


def test_one_window_has_no_interval():
    with pytest.raises(DataError, match="at least 2 windows"):
        perplexity(torch.ones(1, 10))
