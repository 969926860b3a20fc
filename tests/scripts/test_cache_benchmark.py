"""benchmarks/cache.py: compressed caches and transformers' own in one harness."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers as tf

from lilliput.metrics.evaluate import evaluate


@pytest.fixture(scope="module")
def cache(script: Callable[..., ModuleType]) -> ModuleType:
    return script("cache", "benchmarks")


COMMON = ["--windows", "2", "--tokens", "64", "--chunk", "32", "--prompts", "2", "--prompt", "16", "--new", "8"]
FEW = ["--samples", "2", "--sample-tokens", "32"]


@pytest.mark.slow
def test_rows_of_both_sides(cache: ModuleType, tiny: Callable[[str], Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "rows.json"
    recipes = [
        "--recipes",
        "whole=sink-window sink-window.window=500",
        "kv2=kv-rtn kv-rtn.bits=2",
        "kv-fp8",
        "odd=kivi kivi.residual=20",
    ]
    more = ["--theirs", "fp8", "hqq:5", "--at", "96", *FEW, "--out", str(out)]
    cache.main([str(tiny("llama")), *COMMON, *recipes, *more, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    rows = printed["rows"]
    assert list(rows) == ["fp8", "hqq:5", "whole", "kv2", "kv-fp8", "odd"]
    assert rows["whole"]["kl"]["value"] < 1e-9
    assert rows["whole"]["first_differences"] == [8, 8]
    assert rows["whole"]["same_tokens"]["value"] == 1.0
    assert rows["whole"]["perplexity"]["value"] == pytest.approx(printed["original"]["perplexity"]["value"], rel=1e-6)
    assert rows["kv2"]["kl"]["value"] > rows["kv-fp8"]["kl"]["value"] > 1e-9
    elements = 4 * 2 * 96 * 2 * 16  # layers, sides, tokens, heads, width
    assert rows["whole"]["bytes"] == 2 * elements + 4 * 96 * 4  # and where each token was
    assert rows["kv-fp8"]["bytes"] == elements
    assert rows["fp8"]["bytes"] == elements + 4 * 2 * 4  # and a scale for each side of a layer
    assert rows["fp8"]["kl"]["value"] > 1e-9
    assert "residual of 20" in rows["odd"]["refused"]
    assert set(rows["hqq:5"]) in ({"missing"}, {"refused"})
    assert "| odd | refused: " in cache.table(rows)


@pytest.mark.slow
def test_figures_are_those_of_the_evaluation(cache: ModuleType, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "rows.json"
    cache.main([str(model), *COMMON, "--recipes", "kv2=kv-rtn kv-rtn.bits=2", "--theirs", *FEW, "--out", str(out)])
    row = json.loads(out.read_text())["rows"]["kv2"]
    options = SimpleNamespace(calibration="docs", samples=2, sample_tokens=32)
    with cache.made(str(model), ["kv-rtn", "kv-rtn.bits=2"], options) as folder:
        found = evaluate(folder, model, windows=2, tokens=64, chunk=32)
    assert found.kl is not None
    assert row["kl"]["value"] == pytest.approx(found.kl.value, rel=1e-3)
    assert row["perplexity"]["value"] == pytest.approx(found.perplexity.value, rel=1e-4)


def test_all_that_is_held_counts(cache: ModuleType) -> None:
    x = torch.zeros(3, dtype=torch.int16)
    assert cache.held((x, {"scale": torch.zeros(2), "shape": (1, 2)}, None, [torch.zeros(1).double()])) == 6 + 8 + 8
    assert cache.held(tf.DynamicCache().layers) == 0
