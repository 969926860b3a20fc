"""Method pages: --check tells a current folder from an old one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "make_docs.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_pages_are_written_checked_and_removed(tmp_path: Path) -> None:
    root = ("--root", str(tmp_path))
    assert make("--check", *root).returncode == 1
    assert make(*root).returncode == 0
    assert make("--check", *root).returncode == 0
    page = tmp_path / "docs" / "methods" / "rtn.md"
    assert page.read_text().startswith("# rtn\n")
    page.write_text("edited")
    (page.parent / "gone.md").write_text("of a method that is gone")
    checked = make("--check", *root)
    assert checked.returncode == 1
    assert "gone.md, rtn.md" in checked.stderr
    make(*root)
    assert not (page.parent / "gone.md").exists()
    assert make("--check", *root).returncode == 0
