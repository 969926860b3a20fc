"""Sizes and bit widths on one picture: rows, front, page, terminal."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest

from lilliput.errors import DataError
from lilliput.report import terminal
from lilliput.report.scaling import headline, render_scaling, scaling_rows, scaling_table
from lilliput.report.table import text


def model(sample: dict[str, Any], name: str, size: int, bits: int | None, loss: float, right: float) -> dict[str, Any]:
    found = copy.deepcopy(sample)
    found["model"], found["against"] = f"out/{name}", f"models/{name.partition('-')[0]}"
    found["size"] |= {"bytes": size, "bits_per_weight": 15.9}
    found["recipe"] = {"steps": [{"method": "gptq", "target": {"bits": bits}}]} if bits else None
    for row in found["quality"]["data"]:
        row["perplexity"] = {
            k: math.exp(x) for k, x in zip(("value", "low", "high"), (loss, loss - 0.1, loss + 0.1), strict=True)
        }
    for row in found["tasks"]:
        row["ours"] = {"value": right, "low": right - 0.03, "high": right + 0.03}
    return found


@pytest.fixture
def models(sample: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        model(sample, "small", 200, None, 3.0, 0.5),
        model(sample, "small-w4", 60, 4, 3.1, 0.48),
        model(sample, "small-w2", 40, 2, 5.0, 0.3),
        model(sample, "large", 800, None, 2.5, 0.7),
        model(sample, "large-w4", 190, 4, 2.6, 0.68),
        model(sample, "large-w2", 110, 2, 4.0, 0.4),
    ]


def test_rows_have_bits_loss_accuracy_and_the_front(models: list[dict[str, Any]]) -> None:
    rows = scaling_rows(models)
    assert [row["bits"] for row in rows] == [16, 4, 2, 16, 4, 2]
    assert rows[1]["total_bits"] == 480
    assert rows[0]["loss"]["low"] == pytest.approx(2.9)
    tasks = len(models[0]["tasks"])
    assert rows[0]["accuracy"]["value"] == pytest.approx(0.5)
    assert rows[0]["accuracy"]["high"] == pytest.approx(0.5 + 0.03 / math.sqrt(tasks))
    assert [row["name"] for row in rows if row["best_loss"]] == ["small-w4", "small-w2", "large", "large-w4"]
    assert [row["best_loss"] for row in rows] == [row["best_accuracy"] for row in rows]
    assert headline(rows) == (
        "4 of 6 models are not beaten by any with as few bits: 2 of 4 bits, 1 of 2 bits, 1 of 16 bits."
    )


def test_only_tasks_that_all_have_count(models: list[dict[str, Any]]) -> None:
    models[0]["tasks"] = []
    assert {row["accuracy"] for row in scaling_rows(models)} == {None}
    assert "accuracy" not in scaling_table(scaling_rows(models)).columns


def test_the_page_has_a_line_for_each_width_and_its_front(models: list[dict[str, Any]]) -> None:
    page = render_scaling(models)
    assert page == render_scaling(models)
    assert page.count('class="drawn"') == 2
    for said in ("2 bits", "4 bits", "16 bits", "Accuracy against bits", "bits of the whole model"):
        assert said in page
    assert len(set(re.findall(r"<title>((?:small|large)[^<]*)</title>", page))) == 6
    assert "http" not in page.replace("http-equiv", "")


def test_the_terminal_shows_the_widths_in_order(models: list[dict[str, Any]]) -> None:
    lines = text(terminal.scaling(models), 140).splitlines()
    assert lines[0].startswith("4 of 6 models")
    order = [line.split()[0] for line in lines if re.match(r"\s+(small|large)", line)]
    assert order == ["small", "large", "small-w4", "large-w4", "small-w2", "large-w2"]


def test_what_cannot_be_drawn_is_refused(models: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="1 model shows no scaling"):
        scaling_rows(models[:1])
    for row in models[1]["quality"]["data"]:
        row["fingerprint"] = f"other {row['name']}"
    with pytest.raises(DataError, match="no text in common"):
        scaling_rows(models)
    models[2]["size"] = None
    with pytest.raises(DataError, match=r"small-w2: its size .* `lilliput eval out/small-w2 --json`"):
        scaling_rows(models[2:])
