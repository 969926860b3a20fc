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

from lilliput import methods

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "weight": "my-rounding",
    "rewrite": "my-evening",
    "fit": "my-scaling",
    "edit": "my-thinning",
    "repair": "my-mending",
    "allocate": "my-division",
    "search": "my-trying",
    "learn": "my-mirror",
    "choose": "my-foresight",
    "behaviour": "my-gating",
    "inputs": "my-grid",
    "cache": "my-storing",
    "train": "my-training",
    "adapter": "my-adapter",
    "objective": "my-objective",
}
FOUND = """
from lilliput.methods.index import index
from lilliput.recipe.load import load


def test_all_are_found() -> None:
    assert set(NAMES) <= {entry["name"] for entry in index()}
    assert load("my-rounding").steps[0].method == "my-rounding"
    assert [step.method for step in load("my-division").steps] == ["my-division", "magnitude"]
"""


def test_every_family_with_methods_has_a_template(script: Callable[[str], ModuleType]) -> None:
    assert set(script("new_method").FAMILIES) == {family for family, spec in methods.verbs().items() if spec}
    assert set(NAMES) == set(script("new_method").FAMILIES)


def _run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def test_generated_methods_pass_their_tests_and_the_contracts_and_are_found(
    tmp_path: Path, script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "test_catalogue.py")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignored)
    shutil.copytree(ROOT / "tests" / "contract", tmp_path / "tests" / "contract", ignore=ignored)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for family, name in NAMES.items():
        script("new_method").main([family, name, "--root", str(tmp_path)])
    tests = tmp_path / "tests" / "methods"
    assert str(tests / "rewrite" / "test_my_evening.py") in capsys.readouterr().out
    (tests / "test_found.py").write_text(f"NAMES = {list(NAMES.values())}\n{FOUND}")
    assert "23 passed" in _run(tmp_path, str(tests))
    said = _run(tmp_path, "-vv", "-k", "my-", str(tmp_path / "tests" / "contract"))
    assert all(f"[{name}" in said or f"-{name}" in said for name in NAMES.values())


@pytest.mark.parametrize("family", NAMES)
def test_generated_files_are_tidy(tmp_path: Path, script: Callable[[str], ModuleType], family: str) -> None:
    ruff = Path(sys.executable).parent / "ruff"
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    files = [str(path) for path in script("new_method").write(tmp_path, family, "my-other-method")]
    assert all("my_method" not in Path(path).read_text() for path in files)
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
