"""Lilliput compresses Hugging Face causal language models, block by block, and proves what it cost.

The names below load the package, torch and transformers with it, when the first of them is asked for: `lilliput --help`
needs none of it.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lilliput.runtime import register

if TYPE_CHECKING:
    from lilliput.api import compress, evaluate, generate, inspect, load, plan, verify
    from lilliput.compression import Compression
    from lilliput.errors import LilliputError
    from lilliput.recipe import Recipe, Step, Target, Where

__version__ = "0.1.0"

__all__ = [
    "Compression",
    "LilliputError",
    "Recipe",
    "Step",
    "Target",
    "Where",
    "__version__",
    "compress",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "plan",
    "verify",
]


class _Package(ModuleType):
    """The package, in which the submodule `plan` does not hide the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lilliput' has no attribute '{name}'")
    # The interface imports all of the package, and so sets the base that memory is counted from.
    return getattr(import_module("lilliput.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
register()
