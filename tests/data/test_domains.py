"""Dynamic batch loading: weights by losses, rows by weights."""

from __future__ import annotations

import math

import pytest
import torch

from lilliput.data.domains import Mixture, reweighed
from lilliput.errors import DataError


def test_domains_at_their_reference_or_below_keep_their_weights() -> None:
    assert reweighed([0.2, 0.3, 0.5], [2.0, 1.0, 3.0], [2.0, 1.5, 3.0]) == pytest.approx((0.2, 0.3, 0.5))


def test_the_farther_above_its_reference_the_likelier() -> None:
    new = reweighed([0.2, 0.3, 0.5], [2.5, 1.0, 3.2], [2.0, 1.5, 3.0])
    raw = [0.2 * math.exp(0.5), 0.3, 0.5 * math.exp(0.2)]
    assert new == pytest.approx([x / sum(raw) for x in raw])
    assert sum(new) == pytest.approx(1.0)
    huge = reweighed([0.5, 0.5], [5000.0, 1.0], [0.0, 1.0])
    assert huge == pytest.approx((1.0, 0.0))


def test_rows_come_as_often_as_weights_say_and_each_before_any_comes_again() -> None:
    domain = torch.tensor([0] * 5 + [1] * 20)
    mixture = Mixture(domain, [1.0, 3.0], seed=0)
    drawn = [row for step in range(200) for row in mixture.batch(step, 4)]
    second = [row for row in drawn if row >= 5]
    assert len(second) / len(drawn) == pytest.approx(0.75, abs=0.05)
    assert sorted(second[:20]) == list(range(5, 25))
    first = [row for row in drawn if row < 5]
    assert sorted(first[:5]) == sorted(first[5:10]) == list(range(5))
    assert first[:5] != first[5:10]


def test_a_mixture_goes_on_from_its_state() -> None:
    domain = torch.tensor([0, 1] * 6)
    whole, half = (Mixture(domain, [1.0, 1.0], seed=3) for _ in range(2))
    losses, reference = [3.0, 1.0], [1.0, 1.0]
    expected = []
    for step in range(6):
        if step == 2:
            whole.learn(losses, reference)
        expected.append(whole.batch(step, 4))
    for step in range(4):
        if step == 2:
            half.learn(losses, reference)
        half.batch(step, 4)
    again = Mixture(domain, [1.0, 1.0], seed=3)
    again.restore(half.state())
    assert [again.batch(step, 4) for step in (4, 5)] == expected[4:]


@pytest.mark.parametrize(
    ("weights", "said"), [([1.0, 1.0, 1.0], "text 3 of 3 has no row"), ([0.0, 0.0], "not all"), ([-1.0, 2.0], "from 0")]
)
def test_what_cannot_be_mixed_is_refused(weights: list[float], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Mixture(torch.tensor([0, 1]), weights, seed=0)


def test_losses_that_are_no_numbers_weigh_nothing() -> None:
    with pytest.raises(DataError, match="cannot be weighed"):
        reweighed([0.5, 0.5], [float("nan"), 1.0], [1.0, 1.0])
