"""Abilities, categories and judges in page and terminal."""

from __future__ import annotations

from typing import Any

from lilliput.report import terminal
from lilliput.report.groups import ability_table, judged_table
from lilliput.report.page import render
from lilliput.report.table import text

JUDGED = {
    "source": "data/vicuna.jsonl",
    "judge": "big-one",
    "judged": [
        {
            "name": "all",
            "prompts": 80,
            "win_rate": {"value": 0.44, "low": 0.36, "high": 0.52},
            "wins": 20,
            "ties": 30,
            "losses": 30,
            "consistent": {"value": 0.7, "low": 0.6, "high": 0.8},
            "p_value": 0.2,
        },
        {"name": "writing", "prompts": 1, "win_rate": None, "wins": 0, "ties": 1, "losses": 0, "consistent": None},
    ],
}


def test_abilities_are_shown_where_there_are_several(sample: dict[str, Any]) -> None:
    found = ability_table(sample)
    assert [row[0].text for row in found.rows] == ["common sense", "reasoning"]
    assert [row[1].tone for row in found.rows] == ["ok", "bad"]
    assert found.rows[1][2].line == "−7.5 [−5.0, +2.0]"
    page = render(sample)
    assert "Tasks by what they ask for" in page
    assert "sample-choice by category" in page
    assert "loss of 7.5" in text(terminal.evaluation(sample), 120)
    sample["abilities"] = sample["abilities"][:1]
    assert ability_table(sample).rows == ()


def test_the_judge_is_named_and_a_single_prompt_has_no_rate() -> None:
    found = judged_table([JUDGED])
    cells = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
    assert cells[0]["win rate"].line == "44 % [36, 52]"
    assert cells[0]["won, tied, lost"].text == "20, 30, 30"
    assert {x["judge"].text for x in cells} == {"big-one"}
    assert cells[1]["win rate"].value is None
    assert judged_table([{"source": "x", "judged": []}]).rows == ()
