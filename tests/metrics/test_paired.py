import math
from itertools import product

import numpy as np
import pytest
import torch

from lilliput.errors import DataError
from lilliput.metrics import paired
from lilliput.metrics.paired import Flips


def test_mcnemar_equals_values_by_hand():
    assert paired.mcnemar(0, 0) == 1.0
    assert paired.mcnemar(0, 5) == pytest.approx(2 / 32, rel=1e-12)
    assert paired.mcnemar(6, 0) == pytest.approx(2 / 64, rel=1e-12)
    assert paired.mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024, rel=1e-12)
    assert paired.mcnemar(3, 3) == 1.0
    assert paired.mcnemar(4, 10) == pytest.approx(2 * (1 + 14 + 91 + 364 + 1001) / 2**14, rel=1e-12)
    assert paired.mcnemar(10, 4) == paired.mcnemar(4, 10)


def test_mcnemar_equals_counting_all_tosses():
    for lost, won in [(1, 4), (2, 6), (5, 3)]:
        tosses = list(product((0, 1), repeat=lost + won))
        extreme = sum(min(sum(t), len(t) - sum(t)) <= min(lost, won) for t in tosses)
        assert paired.mcnemar(lost, won) == pytest.approx(extreme / len(tosses), rel=1e-12)


def test_mcnemar_of_many_disagreements_does_not_overflow():
    assert 0.04 < paired.mcnemar(4900, 5100) < 0.05  # z = 2 with continuity correction 1.99


def test_flips_count_each_direction():
    found = paired.flips([True, True, False, False, False], [True, False, True, True, False])
    assert found == Flips(5, lost=2, won=1)
    assert found.difference == pytest.approx(-0.2)
    assert found.to_json() == {"right_to_wrong": 2, "wrong_to_right": 1}
    with pytest.raises(DataError, match="same items"):
        paired.flips([True], [True, False])
    with pytest.raises(DataError, match="at least one"):
        paired.flips([], [])


def test_score_interval_equals_wilsons_formula():
    found = paired.proportion(8, 10)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.4901624715, 0.9433178485), abs=1e-8)
    assert paired.proportion(0, 10).low == 0.0
    assert paired.proportion(0, 10).high == pytest.approx(1.959963984540054**2 / (10 + 1.959963984540054**2))
    assert paired.proportion(10, 10).high == 1.0


def test_difference_equals_bonett_and_price_by_hand():
    found = paired.difference(Flips(98, lost=9, won=3))  # (4 - 10) / 100
    half = 1.959963984540054 * math.sqrt((0.04 + 0.10 - 0.06**2) / 100)
    assert found.value == pytest.approx(-6 / 98)
    assert (found.low, found.high) == pytest.approx((-0.06 - half, -0.06 + half))


def test_difference_without_flips_is_not_a_point():
    found = paired.difference(Flips(40, 0, 0))
    assert found.value == 0.0
    assert found.high == -found.low == pytest.approx(1.959963984540054 * math.sqrt(2 / 42 / 42))


def test_difference_covers_the_truth():
    draw = np.random.default_rng(0)
    lost, won, items = 0.08, 0.03, 150
    counts = draw.multinomial(items, [lost, won, 1 - lost - won], size=2000)
    intervals = [paired.difference(Flips(items, int(a), int(b))) for a, b, _ in counts]
    covered = sum(x.low <= won - lost <= x.high for x in intervals) / len(intervals)
    assert 0.935 < covered < 0.98


def test_bootstrap_is_seeded_and_near_the_normal_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = paired.bootstrap(values, seed=1, samples=4000)
    assert found == paired.bootstrap(values, seed=1, samples=4000)
    assert found != paired.bootstrap(values, seed=2, samples=4000)
    half = 1.96 * float(values.std()) / 20
    assert found.value == pytest.approx(float(values.mean()), abs=1e-6)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
    with pytest.raises(DataError, match="at least 2 items"):
        paired.bootstrap(torch.ones(1))


def test_power_equals_simulation():
    draw = np.random.default_rng(0)
    for items, discordant, loss in [(100, 0.2, 0.1), (400, 0.15, 0.05), (30, 0.3, 0.3)]:
        lost, won = (discordant + loss) / 2, (discordant - loss) / 2
        counts = draw.multinomial(items, [lost, won, 1 - lost - won], size=4000)
        found = sum(paired.mcnemar(int(a), int(b)) <= 0.05 for a, b, _ in counts) / len(counts)
        assert paired.power(items, discordant, loss) == pytest.approx(found, abs=0.025)


def test_power_of_a_certain_loss_by_hand():
    # Five disagreements can never be significant at 5 %, six in one direction are.
    assert paired.power(5, 1.0, 1.0) == 0.0
    assert paired.power(6, 1.0, 1.0) == 1.0
    # Ten items, every second one lost, nothing won: significant from six on.
    tail = sum(math.comb(10, k) for k in range(6, 11)) / 2**10
    assert paired.power(10, 0.5, 0.5) == pytest.approx(tail)


def test_smallest_detectable_loss_has_80_percent_power():
    for items, discordant in [(40, 0.1), (500, 0.05), (2000, 0.2)]:
        loss = paired.detectable(items, discordant)
        assert loss is not None
        assert paired.power(items, discordant, loss) >= 0.8
        assert paired.power(items, discordant, 0.97 * loss) < 0.8
    assert paired.detectable(5, 0.1) is None


def test_more_items_show_smaller_losses_and_correction_larger_ones():
    few, many = paired.detectable(200, 0.1), paired.detectable(2000, 0.1)
    assert few is not None
    assert many is not None
    assert many < few / 2
    corrected = paired.detectable(200, 0.1, alpha=0.01)
    assert corrected is not None
    assert corrected > few


def test_items_needed_agree_with_the_sample_size_formula():
    # Connor 1987: (z_a sqrt(pi) + z_b sqrt(pi - d^2))^2 / d^2, a little less than the exact test needs.
    normal = (1.96 * math.sqrt(0.1) + 0.8416 * math.sqrt(0.1 - 0.05**2)) ** 2 / 0.05**2
    assert normal <= paired.items_needed(0.1, 0.05) <= 1.15 * normal


def test_holm_equals_values_by_hand():
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
    assert paired.holm([]) == []


def test_verdicts():
    loss = paired.verdict(Flips(1000, lost=60, won=20), paired.mcnemar(60, 20))
    assert loss.level == "loss"
    assert loss.text.startswith("loss of 4.0 +- 1.8 points")
    assert paired.verdict(Flips(1000, lost=20, won=60), paired.mcnemar(20, 60)).level == "gain"
    assert paired.verdict(Flips(2000, lost=12, won=10), 1.0).text == "no detectable loss"
    unsure = paired.verdict(Flips(50, lost=2, won=1), 1.0)
    assert unsure.level == "unsure"
    needed = int(unsure.text.split()[2])
    assert paired.power(needed, Flips(50, 2, 1).discordant, 0.02) >= 0.78


def test_false_alarms_stay_under_five_percent():
    draw = np.random.default_rng(3)
    counts = draw.multinomial(200, [0.05, 0.05, 0.9], size=2000)
    assert sum(paired.mcnemar(int(a), int(b)) < 0.05 for a, b, _ in counts) < 0.05 * 2000


def test_bootstrap_draws_are_those_of_numpy_by_hand():
    values = torch.rand(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    draw = np.random.default_rng(5)
    means = values.numpy()[draw.integers(0, 50, size=(1000, 50))].mean(axis=1)
    found = paired.bootstrap(values, seed=5, samples=1000)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=1e-12)


def test_equal_values_have_a_point_for_an_interval():
    assert paired.bootstrap(torch.full((3,), 0.25)).to_json() == {"value": 0.25, "low": 0.25, "high": 0.25}


def test_few_signs_are_all_tried():
    differences = torch.tensor([3.0, 1.0, 2.0, -0.5])
    patterns = [
        abs(sum(s * x for s, x in zip(signs, differences.tolist(), strict=True)))
        for signs in product((-1, 1), repeat=4)
    ]
    expected = sum(x >= 5.5 for x in patterns) / 16
    assert paired.sign_flip(differences) == pytest.approx(expected) == 4 / 16
