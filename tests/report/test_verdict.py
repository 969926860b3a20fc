"""The rules of the verdict, each at its limit, and the gates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lilliput.metrics.interval import exp_interval
from lilliput.report.verdict import check_gates, further_windows, verdict


def interval(low: float, value: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def evidence(*ratios: dict[str, float], **rest: Any) -> dict[str, Any]:
    data = [{"name": f"text{i}", "windows": 8, "perplexity_ratio": ratio} for i, ratio in enumerate(ratios)]
    return {"quality": {"data": data}, **rest}


@pytest.mark.parametrize(
    ("low", "value", "high", "level"),
    [
        (0.998, 1.0, 1.002, "ok"),
        (0.9, 0.95, 0.99, "ok"),
        (1.001, 1.004, 1.0099, "ok"),  # certain, and too small to name
        (1.001, 1.004, 1.0101, "loss"),
        (1.2, 1.3, 1.4, "loss"),
        (1.251, 1.3, 1.4, "bad"),
        (0.999, 1.004, 1.0101, "unsure"),
        (0.9, 0.95, 1.02, "unsure"),
    ],
)
def test_the_interval_of_the_ratio_decides(low: float, value: float, high: float, level: str) -> None:
    assert verdict(evidence(interval(low, value, high)))["level"] == level


def test_the_worst_data_set_decides() -> None:
    fine, lost = interval(0.998, 1.0, 1.002), interval(1.04, 1.05, 1.06)
    answer = verdict(evidence(fine, lost))
    assert answer["level"] == "loss"
    assert "5 % (4 % to 6 %)" in answer["headline"]
    assert answer["reasons"][0].startswith("Perplexity on text1: +5 %")
    assert verdict(evidence(fine, interval(0.9, 1.0, 1.1)))["level"] == "unsure"


def test_a_reason_says_more_than_the_headline() -> None:
    answer = verdict(evidence(interval(1.3, 1.4, 1.5), size={"bytes": 1_000_100, "base_bytes": 1_000_000}))
    assert "1.4 times" in answer["headline"]
    assert answer["reasons"][0] == "On text0 the low end of the interval, 1.3, lies above the limit, 1.25."
    assert answer["reasons"][-1] == "No smaller on disk: 1.0 MB."


def test_a_suspect_or_a_missed_gate_is_bad_whatever_the_ratio() -> None:
    fine = interval(0.998, 1.0, 1.002)
    suspect = {"tensor": "a.weight_scale", "reason": "twice its row", "factor": 2.0}
    answer = verdict(evidence(fine, loss={"suspects": [suspect]}))
    assert answer["level"] == "bad"
    assert answer["headline"] == "Do not ship this: a.weight_scale looks damaged."
    assert answer["reasons"][0] == "a.weight_scale: twice its row (off by a factor of 2)."
    gate = {"name": "--max-kl", "limit": 0.1, "value": 0.12, "passed": False}
    assert "--max-kl 0.1 is missed" in verdict(evidence(fine, gates=[gate]))["headline"]
    assert verdict(evidence(fine, gates=[{**gate, "passed": True}]))["level"] == "ok"


def test_a_task_or_a_divergence_can_show_what_perplexity_hides() -> None:
    fine = interval(0.998, 1.0, 1.002)
    task = {"name": "choice", "level": "loss", "verdict": "loss of 3 points"}
    answer = verdict(evidence(fine, tasks=[task]))
    assert (answer["level"], "choice" in answer["headline"]) == ("loss", True)
    assert "choice: loss of 3 points." in answer["reasons"]
    assert verdict(evidence(fine, tasks=[{**task, "level": "unsure"}]))["level"] == "ok"
    found = evidence(fine)
    found["quality"]["data"][0]["kl"] = interval(0.051, 0.06, 0.07)
    assert verdict(found)["level"] == "loss"
    found["quality"]["data"][0]["kl"] = interval(0.049, 0.06, 0.07)
    assert verdict(found)["level"] == "ok"


def test_without_an_original_nothing_is_said() -> None:
    alone = {"quality": {"data": [{"name": "t", "windows": 2, "perplexity": interval(9, 10, 11)}]}}
    answer = verdict(alone)
    assert answer["level"] == "unsure"
    assert "Perplexity on t: 10." in answer["reasons"]
    assert verdict({})["level"] == "unsure"


def test_so_many_windows_more_settle_it() -> None:
    """Values of the same spread, as many as were asked for, give an interval that excludes one of the limits."""

    def ratio(windows: int, mean: float) -> dict[str, float]:
        raw = torch.tensor([1.0, -1.0] * (windows // 2) + [0.0] * (windows % 2), dtype=torch.float64)
        return exp_interval(mean + 0.04 * raw / raw.std()).to_json()

    def settled(found: dict[str, float]) -> bool:
        return found["low"] >= 1 or found["high"] <= 1.01

    for mean in (0.0, 0.003, 0.008, 0.02, -0.01):
        before = ratio(8, mean)
        assert not settled(before)
        more = further_windows(before, 8)
        assert settled(ratio(8 + more, mean)), mean
        assert not settled(ratio(8 + math.floor(0.9 * more) - 1, mean)), mean
        assert f"about {more:,} more windows" in verdict(evidence(before))["headline"]


def test_what_no_text_settles_is_said() -> None:
    edge = math.log(1.01) / 2
    found = interval(math.exp(edge - 3), math.exp(edge), math.exp(edge + 3))
    assert further_windows(found, 1000) == 100_000
    whole = evidence(found)
    whole["quality"]["data"][0]["windows"] = 1000
    assert "more text will hardly settle it" in verdict(whole)["headline"]


def test_gates_take_the_worst_data_set_and_fail_without_a_figure() -> None:
    found = evidence(interval(1.0, 1.02, 1.04), interval(1.0, 1.05, 1.1))
    for row, kl, same in zip(found["quality"]["data"], (0.2, 0.1), (0.9, 0.95), strict=True):
        row |= {"kl": interval(kl, kl, kl), "agreement": interval(same, same, same)}
    rows = check_gates(found, max_kl=0.2, max_ppl_increase=0.04, min_agreement=0.92)
    assert [(x["name"], x["value"], x["passed"], x["data"]) for x in rows] == [
        ("--max-kl", 0.2, True, "text0"),
        ("--max-ppl-increase", pytest.approx(0.05), False, "text1"),
        ("--min-agreement", 0.9, False, "text0"),
    ]
    assert check_gates(found) == []
    missing = check_gates({}, max_kl=1.0)
    assert [(x["value"], x["passed"]) for x in missing] == [(None, False)]
    assert "was not measured" in verdict({"gates": missing})["headline"]


def test_ratios_beyond_float64_have_a_verdict() -> None:
    """Losses of hundreds of nats, better in one window and worse in the other."""
    found = exp_interval(torch.tensor([-2000.0, 2000.0])).to_json()
    assert 0 < found["low"] < found["high"] < math.inf
    assert further_windows(found, 2) == 100_000
    assert verdict(evidence(found))["level"] == "unsure"
