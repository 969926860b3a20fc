"""The demo's table: every figure whole, in a terminal of 80 columns."""

from collections.abc import Callable
from types import ModuleType

import pytest
from rich.console import Console

from lilliput.units import interval


def between(low: float, value: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


@pytest.fixture
def lines(script: Callable[[str], ModuleType]) -> list[str]:
    sizes = {"bytes": 113.2e6, "bits_per_weight": 4.25, "model_bits_per_weight": 6.726, "peak_rss_bytes": 433.5e6}
    quality = {
        "perplexity": between(12.17, 15.53, 19.82),
        "reference_perplexity": between(11.48, 14.54, 18.42),
        "perplexity_ratio": between(1.052, 1.068, 1.085),
        "kl": between(0.07575, 0.08453, 0.09331),
        "agreement": between(0.8404, 0.8513, 0.8622),
    }
    report = {"predicted": {**sizes, "seconds": 65}, "measured": {**sizes, **quality, "seconds": 157}}
    console = Console(width=80)
    with console.capture() as captured:
        console.print(script("demo").table(report, 184))
    return captured.get().splitlines()


def test_perplexity_of_both_models_stands_in_one_row(lines: list[str]) -> None:
    row = next(x for x in lines if x.strip().startswith("perplexity "))
    assert row.index(interval(between(11.48, 14.54, 18.42))) < row.index(interval(between(12.17, 15.53, 19.82)))


def test_no_figure_and_no_name_is_broken(lines: list[str]) -> None:
    text = "\n".join(lines)
    assert "0.08453 [0.07575, 0.09331]" in text
    rule = next(i for i, x in enumerate(lines) if "──" in x)
    names = [x[:18].strip() for x in lines[rule + 1 :][:10]]
    assert names[1] == "bits per weight"
    assert names[-1] == "time of demo"
