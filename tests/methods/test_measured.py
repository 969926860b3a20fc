"""The figures that pages show: of methods that exist, and whole."""

from __future__ import annotations

import pytest

from lilliput.methods import discover, measured
from lilliput.recipe import page


def test_rows_are_whole_and_of_known_methods() -> None:
    found = measured.figures()
    assert "SmolLM2" in found["protocol"]
    names = [row["name"] for row in found["rows"]]
    assert len(names) == len(set(names))
    assert {method for row in found["rows"] for method in row["methods"]} <= discover().keys()
    for row in found["rows"]:
        value, low, high = row["ratio"]
        assert 0 < low <= value <= high, row["name"]
        assert row["kl"][0] > 0 < row["bits_per_weight"] < 33, row["name"]
        assert "/" not in row["run"].split()[0], row["name"]


def test_a_page_shows_the_rows_of_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "name": "a",
        "run": "gptq gptq.bits=4",
        "methods": ["gptq"],
        "bits_per_weight": 4.3,
        "perplexity": 21.1234,
        "ratio": [1.06, 1.05, 1.07],
        "kl": [0.08, 0.07, 0.09],
        "c4": 1.1,
        "ptb": 1.2,
        "forwards": None,
        "peak_bytes": 3e8,
    }
    rows = [row, row | {"name": "b", "methods": ["awq", "rtn"], "forwards": 3.25, "perplexity": 123456.7}]
    monkeypatch.setattr(measured, "figures", lambda: {"protocol": "how", "rows": rows})
    gptq, rtn, owl = (page.page(discover()[name]) for name in ("gptq", "rtn", "owl"))
    figures = "4.300 | 21.12 | 1.060 [1.050, 1.070] | 0.080 [0.070, 0.090] | 1.100 | 1.200 |  | 300 MB |"
    assert f"| `gptq gptq.bits=4` | {figures}" in gptq
    assert "| 123457 |" in rtn
    assert "| 3.2 |" in rtn
    assert "## Measured" not in owl
