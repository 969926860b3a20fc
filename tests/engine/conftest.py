"""Tiny folders, packed and dense, made by the script that CI runs; loaded here so that there is one such builder."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_capabilities.py"


@pytest.fixture(scope="session")
def capabilities() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_capabilities", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_capabilities"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """One thread, and no load reports: the tests compare numbers."""
    threads, level = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity(level)
