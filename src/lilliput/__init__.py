"""Lilliput compresses Hugging Face causal language models, block by block, and measures the cost.

What a name needs, torch and transformers among it, is loaded when the name is first asked for: `lilliput --help` needs
none of it.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lilliput.machine.version import __version__
from lilliput.runtime import register

if TYPE_CHECKING:
    from lilliput.api import (
        compress,
        convert,
        evaluate,
        generate,
        inspect,
        load,
        merge,
        plan,
        record_mask,
        use_adapter,
        use_mask,
        verify,
    )
    from lilliput.errors import LilliputError
    from lilliput.recipe.schema import Recipe, Step, Where
    from lilliput.run.result import Compression
    from lilliput.target import Target

__all__ = [
    "Compression",
    "LilliputError",
    "Recipe",
    "Step",
    "Target",
    "Where",
    "__version__",
    "compress",
    "convert",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "merge",
    "plan",
    "record_mask",
    "use_adapter",
    "use_mask",
    "verify",
]


# Where the names live that are not of the interface itself.
_HOMES = {
    "Compression": "run.result",
    "LilliputError": "errors",
    "Target": "target",
    **dict.fromkeys(("Recipe", "Step", "Where"), "recipe"),
}


class _Package(ModuleType):
    """The package, in which the submodule `plan` does not hide the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lilliput' has no attribute '{name}'")
    return getattr(import_module(f"lilliput.{_HOMES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
register()
