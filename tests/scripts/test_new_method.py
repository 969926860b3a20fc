"""A generated method works before anything in it is replaced."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FOUND = """
from lilliput.catalogue import index
from lilliput.recipe import load


def test_both_are_found() -> None:
    assert {"my-rounding", "my-evening"} <= {entry["name"] for entry in index()}
    assert load("my-rounding").steps[0].method == "my-rounding"
"""


def test_generated_methods_pass_their_tests_and_are_found(
    tmp_path: Path, script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for family, name in (("weight", "my-rounding"), ("rewrite", "my-evening")):
        script("new_method").main([family, name, "--root", str(tmp_path)])
    tests = tmp_path / "tests" / "methods"
    assert str(tests / "test_my_evening.py") in capsys.readouterr().out
    (tests / "test_found.py").write_text(FOUND)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    assert "8 passed" in ended.stdout


@pytest.mark.parametrize("family", ["weight", "rewrite"])
def test_generated_files_are_tidy(tmp_path: Path, script: Callable[[str], ModuleType], family: str) -> None:
    ruff = Path(sys.executable).parent / "ruff"
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    files = [str(path) for path in script("new_method").write(tmp_path, family, "my-method")]
    for command in (["check"], ["format", "--check"]):
        tidy = subprocess.run([ruff, *command, *files], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert tidy.returncode == 0, tidy.stdout + tidy.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("weights", "mine"), "no family 'weights'"),
        (("weight", "My_Method"), "is no name for a method"),
        (("weight", "rtn"), "there is a method 'rtn' already"),
        (("weight", "mine", "--root", "/nowhere"), "is no checkout"),
    ],
)
def test_what_cannot_be_written_is_refused(
    script: Callable[[str], ModuleType], arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        script("new_method").main(arguments)
