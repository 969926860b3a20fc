"""What a written folder says of where it comes from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import lilliput


def test_names_and_no_paths_of_this_machine(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source, text, out = tmp_path / "Tiny-3.2-1B", tmp_path / "text.txt", tmp_path / "out"
    shutil.copytree(tiny("qwen2"), source)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 2000)
    lilliput.compress(
        source, out, recipe="gptq", data=str(text), samples=2, tokens=32, eval_data=str(text), eval_windows=2
    )
    card = (out / "README.md").read_text()
    assert "# Tiny-3.2-1B-gptq\n" in card
    assert "Compressed from `Tiny-3.2-1B` with" in card
    assert "tokens of text.txt" in card
    record = json.loads((out / "lilliput.json").read_text())
    assert record["model"] == record["measured"]["against"] == "Tiny-3.2-1B"
    assert record["data"]["source"] == record["measured"]["data"] == "text.txt"
    for file in ("README.md", "lilliput.json", "config.json"):
        assert str(tmp_path) not in (out / file).read_text(), file
