"""Registration waits for transformers' registry, and is entered once."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lilliput import runtime

REGISTRY = """
AUTO_QUANTIZER_MAPPING = {}
CALLS = []

def register_quantization_config(name):
    return lambda kind: CALLS.append((name, kind.__name__))

def register_quantizer(name):
    def enter(kind):
        AUTO_QUANTIZER_MAPPING[name] = kind
        CALLS.append((name, kind.__name__))
    return enter
"""


def finders() -> int:
    return sum(isinstance(x, runtime._Finder) for x in sys.meta_path)


def test_waits_for_the_registry_and_steps_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_registry.py").write_text(REGISTRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(runtime, "REGISTRY", "some_registry")
    # That of the package's own import may be waiting still.
    monkeypatch.setattr(sys, "meta_path", [x for x in sys.meta_path if not isinstance(x, runtime._Finder)])
    runtime.register()
    runtime.register()
    assert finders() == 1
    assert "some_registry" not in sys.modules
    registry: ModuleType = importlib.import_module("some_registry")
    monkeypatch.delitem(sys.modules, "some_registry")
    assert finders() == 0
    assert registry.CALLS == [("lilliput", "LilliputConfig"), ("lilliput", "LilliputQuantizer")]
    monkeypatch.setitem(sys.modules, "some_registry", registry)
    runtime.register()
    assert len(registry.CALLS) == 2


def test_transformers_knows_the_layout() -> None:
    auto = importlib.import_module("transformers.quantizers.auto")
    runtime.register()
    assert "lilliput" in auto.AUTO_QUANTIZER_MAPPING
    assert "lilliput" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
