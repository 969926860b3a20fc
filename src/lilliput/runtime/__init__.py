"""Compressed layers inside transformers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Make transformers load `quant_method: "lilliput"` folders. Cheap, and harmless when repeated.

    transformers is not imported for it: where its registry of quantizers is not loaded yet, the entry is added at the
    moment that it is. transformers looks for no plugins by itself, and wrapt's `when_imported`, which would do what the
    finder below does, brings asyncio and a tenth of a second to every command.
    """
    if REGISTRY in sys.modules:
        _enter(sys.modules[REGISTRY])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter(registry: ModuleType) -> None:
    from lilliput.runtime.quantizer import LilliputConfig, LilliputQuantizer

    if "lilliput" not in registry.AUTO_QUANTIZER_MAPPING:
        registry.register_quantization_config("lilliput")(LilliputConfig)
        registry.register_quantizer("lilliput")(LilliputQuantizer)


class _Finder(MetaPathFinder):
    """Sees the registry's import once, and steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs the module, then adds the entry."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _enter(module)
