"""Tables: every figure of the plain data shows, in words and units, without colour."""

from __future__ import annotations

from typing import Any

from lilliput.report import table

PLAN = {
    "model": "m",
    "recipe": {"name": "w4", "steps": [{"method": "gptq"}]},
    "bytes": 101_000_000,
    "bits_per_weight": 4.1256,
    "peak_rss_bytes": 390_000_000,
    "peak_phase": None,
    "seconds": 95.0,
    "by_kind": {"norm": {"tensors": 61, "bytes": 70_272}, "quantized": {"tensors": 630, "bytes": 55_000_000}},
    "formats": {"int4 g64 sym": 210},
    "notes": ["an engine will run this dense"],
    "tensors": [{"name": "a.weight", "bytes": 5}],
}


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


def test_a_plan_shows_totals_and_kinds_largest_first() -> None:
    said = table.text(table.plan(PLAN))
    assert "\x1b" not in said
    words = lines(said)
    assert ["size", "101.0", "MB"] in words
    assert ["peak", "RAM", "390.0", "MB"] in words
    assert ["time", "1", "min", "35", "s"] in words
    assert ["recipe", "w4:", "gptq"] in words
    assert ["int4", "g64", "sym", "210"] in words
    assert "note: an engine will run this dense" in said
    assert words.index(["quantized", "630", "55.0", "MB"]) < words.index(["norm", "61", "70.3", "kB"])
    assert "a.weight" not in said
    assert "phase" not in said


def test_a_compression_with_evidence_still_says_how_it_was_made(sample: dict[str, Any]) -> None:
    sample["notes"] = ["intervals: 95 %"]
    done = {
        "out": "out/sample-lm-w4",
        "recipe": PLAN["recipe"],
        "format": "compressed-tensors",
        "predicted": {"bytes": 100_000_000},
        "measured": {"bytes": 100_000_123, "kl": {"value": 0.125, "low": 0.1, "high": 0.15}},
        "blocks_skipped": 3,
        "notes": ["an engine will run this dense", "intervals: 95 %"],
        "rows": [{"name": "a.weight"}],
        "evidence": sample,
    }
    said = table.text(table.compress(done), 120)
    words = lines(said)
    for line in (["recipe", "w4:", "gptq"], ["format", "compressed-tensors"], ["blocks", "skipped", "3"]):
        assert line in words
    assert ["size", "100.0", "MB", "100.0", "MB"] in words
    assert said.count("note: an engine will run this dense") == said.count("note: intervals: 95 %") == 1
    assert "LOSS" in said
    assert "KL divergence from the original" not in said  # the evidence has it
    assert "KL divergence from the original" in table.text(table.compress({**done, "evidence": None}), 120)


def test_an_evaluation_shows_intervals() -> None:
    data = {
        "perplexity": {"value": 21.234567, "low": 20.1, "high": 22.4},
        "agreement": {"value": 0.91, "low": 0.9, "high": 0.92},
    }
    said = table.text(table.evaluation(data))
    assert "21.23 [20.1, 22.4]" in said
    assert "0.91 [0.9, 0.92]" in said


def test_names_are_not_taken_for_markup() -> None:
    said = table.text(table.inspect({"head": "[bold]lm_head[/bold] :smile:", "notes": ["[red]x"]}))
    assert "[bold]lm_head[/bold] :smile:" in said
    assert "[red]x" in said


def test_long_lists_are_cut_and_say_so() -> None:
    data = {"sites": [{"name": f"site{i}", "width": 8, "linears": ["q"]} for i in range(50)], "tied": True}
    said = table.text(table.inspect(data))
    assert "site39" in said
    assert "site40" not in said
    assert "and 10 more" in said
    assert ["tied", "yes"] in lines(said)


def test_problems_are_listed_in_full() -> None:
    said = table.text(table.verify({"whole": False, "problems": ["a.safetensors: sha256 differs"]}))
    assert ["whole", "no"] in lines(said)
    assert "problem: a.safetensors: sha256 differs" in said


def test_methods_are_one_line_each() -> None:
    entry = {"name": "rtn", "verb": "compress", "writes": "quantized", "needs": [], "summary": "Rounds.", "paper": "x"}
    said = table.text(table.methods([entry]))
    assert ["rtn", "compress", "-", "Rounds."] in lines(said)
