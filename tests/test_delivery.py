"""What the engine makes of a folder decides whether it appears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lilliput import api, delivery
from lilliput.errors import LilliputError
from lilliput.export.engine import Look
from lilliput.progress import Quiet
from lilliput.report import provenance

Tiny = Callable[[str], Path]


def compress(model: Path, out: Path) -> api.Compression:
    return api.compress(model, out, recipe="rtn", tokens=32, eval_windows=0, progress=Quiet())


def test_a_folder_that_its_engine_reads_otherwise_does_not_appear(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        wrong = Look("an engine", ("it draws the head at random",))
        patched.setattr(delivery, "look", lambda *_, **__: wrong)
        with pytest.raises(LilliputError, match=r"an engine does not compute .*: it draws the head at random.*lilliput"):
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
