"""The promise of --memory where the vocabulary is the largest thing of all: each run a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SHAPE = {"layers": 2, "hidden": 640, "inner": 1024, "heads": 4, "kv": 1, "vocabulary": 262_144, "context": 256}
BUDGET = 650_000_000  # less than the table of embeddings in float32 takes alone


@pytest.fixture(scope="module")
def benchmark(script: Callable[..., ModuleType]) -> ModuleType:
    return script("memory", "benchmarks")


@pytest.mark.slow
@pytest.mark.parametrize("container", ["gguf", "safetensors"])
def test_the_peak_stays_within_the_budget_and_near_the_plan(
    benchmark: ModuleType, tmp_path: Path, container: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A day like any other, and the same again. " * 500)
    model = tmp_path / ("model.gguf" if container == "gguf" else "model")
    if container == "gguf":
        benchmark.write_gguf(model, **SHAPE)
    else:
        benchmark.write_model(model, merged=True, **SHAPE)
    arguments = ["--recipe", "gptq", "--samples", "4", "--tokens", "256", "--eval-windows", "2"]
    arguments += ["--eval-data", str(text), "--memory", str(BUDGET)]
    found = benchmark.measure(model, tmp_path / "out", text, arguments)
    assert 4 * SHAPE["vocabulary"] * SHAPE["hidden"] > BUDGET
    assert found["peak_above_base"] <= found["predicted_peak"] <= BUDGET
    assert found["predicted_peak"] <= 1.25 * found["peak_above_base"]
