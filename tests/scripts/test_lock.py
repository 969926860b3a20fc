"""The lock holds what pyproject.toml asks for, and works wherever packages come from."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PINS = [Requirement(x) for x in LOCK.splitlines() if not x.startswith("#")]
CUDA = ("cuda-", "nvidia-", "triton")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ASKED = [Requirement(x) for x in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]


def pinned(name: str, python: str) -> list[str]:
    """Versions that the lock gives a package on Linux with that Python."""
    here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    environment = {**default_environment(), **here}
    fits = [x for x in PINS if canonicalize_name(x.name) == canonicalize_name(name)]
    return [str(next(iter(x.specifier)).version) for x in fits if x.marker is None or x.marker.evaluate(environment)]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_package_that_is_asked_for_has_one_version_in_its_range(python):
    for asked in ASKED:
        if asked.name == "torch":
            continue
        found = pinned(asked.name, python)
        assert len(found) == 1, f"{asked}: {found}; run make lock"
        assert found[0] in asked.specifier, f"{asked}: {found[0]}; run make lock"


def test_every_entry_is_one_exact_version():
    assert len(PINS) > 100
    for pin in PINS:
        assert [x.operator for x in pin.specifier] == ["=="], pin


def test_torch_is_left_to_its_build_but_what_it_needs_is_held():
    names = {canonicalize_name(x.name) for x in PINS}
    assert not {x for x in names if x == "torch" or x.startswith(CUDA)}
    needs = [Requirement(x) for x in importlib.metadata.requires("torch") or ()]
    needs = [x for x in needs if x.marker is None or x.marker.evaluate({**default_environment(), "extra": ""})]
    plain = {canonicalize_name(x.name) for x in needs if not x.name.startswith(CUDA)}
    assert "sympy" in plain
    assert plain <= names


def test_no_place_is_named():
    assert "://" not in LOCK
    assert "index" not in LOCK


def test_every_dependency_has_an_upper_bound():
    for asked in ASKED:
        assert asked.name.startswith("types-") or any(x.operator == "<" for x in asked.specifier), asked
