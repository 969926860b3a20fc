"""Tiny folders, packed and dense, made by the script that CI runs; loaded here so that there is one such builder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import transformers


@pytest.fixture(scope="session")
def capabilities(script: Callable[..., ModuleType]) -> ModuleType:
    return script("check_capabilities")


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
