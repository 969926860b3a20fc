"""What a written folder says of where it comes from, and that it appears only where its engine reads it alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import lilliput
from lilliput import api
from lilliput.errors import LilliputError
from lilliput.export import provenance
from lilliput.export.engine import Look
from lilliput.progress import Quiet
from lilliput.run import delivery

Tiny = Callable[[str], Path]


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


def compress(model: Path, out: Path) -> api.Compression:
    return api.compress(model, out, recipe="rtn", tokens=32, eval_windows=0, progress=Quiet())


def test_a_folder_that_its_engine_reads_otherwise_does_not_appear(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        wrong = Look("an engine", ("it draws the head at random",))
        patched.setattr(delivery, "look", lambda *_, **__: wrong)
        with pytest.raises(
            LilliputError, match=r"an engine does not compute .*: it draws the head at random.*lilliput"
        ):
            compress(tiny("llama"), out)
    assert not out.exists()
    done = compress(tiny("llama"), out)
    assert done.skipped == 4  # what was finished stayed


def test_the_report_tells_what_the_engine_computes(tiny: Tiny, tmp_path: Path) -> None:
    done = compress(tiny("llama"), tmp_path / "out")
    assert done.engine is not None
    assert done.engine.problems == ()
    assert done.engine.blocks == 4
    record = provenance.read(tmp_path / "out")
    assert record is not None
    assert record.measured["engine"] == done.engine.detail == done.to_json()["measured"]["engine"]
    assert "4 blocks compute what the files say" in done.engine.detail
