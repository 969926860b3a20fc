"""Methods, one file each. The folder fixes the verb; a file is found by its name, there is no list to extend.

A method file ends with `METHOD`, the spec of its verb (see `lilliput.verbs`) with everything filled in.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lilliput.errors import PlanError, nearest
from lilliput.verbs.spec import Method, Spec


def _families() -> Iterator[str]:
    """Names of the folders."""
    for folder in map(Path, __path__):
        yield from sorted(x.name for x in folder.iterdir() if x.is_dir() and x.name.isidentifier() and x.name[0] != "_")


def _load(family: str, name: str) -> Method:
    """A method file. Raises RuntimeError where it declares no method, or one of another folder's verb."""
    module = importlib.import_module(f"lilliput.methods.{family}.{name}")
    spec = vars(module).get("METHOD")
    if not isinstance(spec, Spec):
        raise RuntimeError(f"{module.__file__} declares no METHOD: end it with the spec of its verb")
    if spec.family != family:
        raise RuntimeError(f"{module.__file__} declares a method of the verb '{spec.verb}': move it to {spec.family}/")
    return Method(name.replace("_", "-"), spec, (module.__doc__ or "").strip())


@functools.cache
def discover() -> Mapping[str, Method]:
    """All methods by name, found by listing the folders."""
    methods: dict[str, Method] = {}
    for family in _families():
        package = importlib.import_module(f"lilliput.methods.{family}")
        for info in pkgutil.iter_modules(package.__path__):
            method = _load(family, info.name)
            if method.name in methods:
                raise RuntimeError(f"two methods are called {method.name}")
            methods[method.name] = method
    return methods


@functools.cache
def verbs() -> Mapping[str, type[Spec[Any]] | None]:
    """By folder, the spec of its verb; None where the folder waits for its first method, and so for its verb."""
    specs = {method.spec.family: type(method.spec) for method in discover().values()}
    return {family: specs.get(family) for family in _families()}


def get(name: str) -> Method:
    """The method `name`. Raises PlanError with the nearest name."""
    methods = discover()
    if name not in methods:
        raise PlanError(f"unknown method '{name}'.{nearest(name, methods)}")
    return methods[name]
