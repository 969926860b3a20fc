"""benchmarks/recipes.py: rows of named recipes on any model, one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def recipes(script: Callable[..., ModuleType]) -> ModuleType:
    return script("recipes", "benchmarks")


def test_texts_have_names_and_windows(recipes: ModuleType) -> None:
    assert recipes.texts_of(["docs:library", "c4=a@b.txt", "ptb=p.txt@4"], 16) == {
        "docs:library": ("docs:library", 16),
        "c4": ("a@b.txt", 16),
        "ptb": ("p.txt", 4),
    }


@pytest.mark.slow
def test_rows_are_measured_once_and_a_refusal_is_one(
    recipes: ModuleType,
    tiny: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "rows.json"
    command = [str(tiny("llama")), "--data", "text=docs:library@2", "--samples", "2", "--tokens", "32", "--out"]
    runs = ["--recipes", "rtn", "odd=flap flap.ratio=0.9"]
    recipes.main([*command, str(out), *runs])
    rows = json.loads(out.read_text())
    assert list(rows) == ["rtn", "odd"]
    assert rows["rtn"]["texts"]["text"]["perplexity_ratio"]["value"] > 1.0
    assert 4.0 < rows["rtn"]["bits_per_weight"] < 5.0
    assert "hidden channels hold" in rows["odd"]["refused"]
    printed = capsys.readouterr().out
    assert "| rtn | 4." in printed
    assert "| odd | refused" in printed

    # A second call asks for nothing that is there, in whatever order; other calibration makes another row.
    monkeypatch.setattr(recipes, "measured", lambda *_: pytest.fail("measured again"))
    recipes.main([*command, str(out), *runs])
    assert capsys.readouterr().out == printed
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        recipes.main([*command, str(out), "--recipes", "rtn", "--seed", "1"])
