"""A generated method works before anything in it is replaced."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "new_method.py"


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_generated_methods_pass_their_tests_and_are_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for family, name in (("weight", "my-rounding"), ("rewrite", "my-evening")):
        wrote = generate(family, name, "--root", str(tmp_path))
        assert wrote.returncode == 0, wrote.stderr
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path / "tests" / "reference")]
    ended = subprocess.run(tests, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    assert "7 passed" in ended.stdout
    found = "from lilliput.catalogue import index; print(*[x['name'] for x in index()])"
    names = subprocess.run([sys.executable, "-c", found], env=environment, capture_output=True, text=True, check=True)
    assert {"my-rounding", "my-evening"} <= set(names.stdout.split())
    ruff = shutil.which("ruff", path=Path(sys.executable).parent)
    if ruff is not None:
        written = [*tmp_path.glob("src/lilliput/methods/*/my_*.py"), *tmp_path.glob("tests/reference/*.py")]
        for command in (["check"], ["format", "--check"]):
            tidy = subprocess.run(
                [ruff, *command, *map(str, written)], cwd=tmp_path, capture_output=True, text=True, check=False
            )
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
def test_what_cannot_be_written_is_refused(arguments: tuple[str, ...], said: str) -> None:
    ended = generate(*arguments)
    assert ended.returncode != 0
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
