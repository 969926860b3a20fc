"""Method pages: --check tells a current folder from an old one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_pages_are_written_checked_and_removed(tmp_path: Path, script: Callable[[str], ModuleType]) -> None:
    make = script("make_docs").main
    root = ("--root", str(tmp_path))
    with pytest.raises(SystemExit, match=r"rtn\.md"):
        make(["--check", *root])
    make(root)
    make(["--check", *root])
    page = tmp_path / "docs" / "methods" / "rtn.md"
    assert page.read_text().startswith("# rtn\n")
    assert "\n## perplexity\n" in (tmp_path / "docs" / "metrics.md").read_text()
    page.write_text("edited")
    (page.parent / "gone.md").write_text("of a method that is gone")
    with pytest.raises(SystemExit, match=r"methods/gone\.md, methods/rtn\.md"):
        make(["--check", *root])
    make(root)
    assert not (page.parent / "gone.md").exists()
    make(["--check", *root])
