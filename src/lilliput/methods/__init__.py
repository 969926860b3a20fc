"""Methods, one file each. The folder fixes the verb; a file is found by its name, there is no list to extend."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError

from lilliput.errors import PlanError, nearest
from lilliput.formats.known import from_target
from lilliput.parts.quantized import QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.target import Target

VERBS: Mapping[str, str] = {
    "weight": "compress",
    "rewrite": "rewrite",
    "fit": "fit",
    "edit": "edit",
    "allocate": "allocate",
    "search": "search",
    "learn": "learn",
    "objective": "objective",
    "cache": "cache",
}


@dataclass(frozen=True)
class Method:
    """A discovered method file.

    `needs`: names of site statistics, or "fisher" (squared gradients by weight); `writes`: "quantized", "parts",
    "support", "fold" or "targets"; `covers`: catalogue id to the recipe that runs it (a list of steps as plain data),
    or None where the id is an idea and no computation, or a sentence where it cannot be run yet; `recipe`: the steps
    that run the method by default where it cannot run alone, or why none do; `formats`: the target's formats that it
    can have (None: every one); `rowwise`: each output row is treated by itself, so linears of one site may be stacked;
    `masked`: it keeps the zeros of a pruned linear; `default`: fields of the target for a step that names none of them;
    `double`: it decomposes weights in float64; `scratch`: bytes that it works in beyond a few copies of the weights and
    the Gram matrix, whatever their shapes; `baseline`: the method whose error this one must beat (None: it is a
    baseline); `note`: what the plan says of a recipe that has it.
    """

    name: str
    family: str
    verb: str
    summary: str
    paper: str
    needs: frozenset[str]
    writes: str
    covers: Mapping[str, list[dict[str, Any]] | str | None]
    recipe: list[dict[str, Any]] | str
    formats: tuple[str, ...] | None
    rowwise: bool
    masked: bool
    default: Mapping[str, Any]
    double: bool
    scratch: int
    baseline: str | None
    note: str | None
    module: ModuleType

    @property
    def options(self) -> type[BaseModel]:
        return self.module.Options  # type: ignore[no-any-return]

    def scheme(self, target: Target, options: BaseModel, rows: int, width: int) -> Scheme:
        """What the step adds to a [rows, width] linear: the module's own `scheme`, or one part of the target's format.

        Raises PlanError where the method or format cannot have this target on a matrix of this shape.
        """
        if self.formats is not None and target.format not in self.formats:
            raise PlanError(f"'{self.name}' has no format '{target.format}': choose {', '.join(self.formats)}, or rtn")
        own = getattr(self.module, "scheme", None)
        if own is not None:
            scheme: Scheme = own(target, options, rows, width)
        else:
            scheme = Scheme((QuantizedSpec(from_target(target)),)) if self.writes == "quantized" else Scheme()
        for part in scheme.parts:
            if isinstance(part, QuantizedSpec) and hasattr(part.format, "check"):
                part.format.check(rows, width)
        return scheme

    def replaces(self, options: BaseModel) -> bool:
        """Whether the step leaves a plain weight of its own, which no other step may touch."""
        own = getattr(self.module, "replaces", None)
        return own is not None and bool(own(options))

    def cannot_try(self, other: Method, options: BaseModel) -> str | None:
        """Why this method, which decides by trying, cannot try out a step of the other one."""
        names: tuple[str, ...] = self.module.GOVERNS
        if other.name not in names:
            return (
                f"it tries out {' or '.join(names)}, not '{other.name}': put that step behind it, and restrict 'where' "
                "of this step to its layers"
            )
        if "fisher" in (other.module.needs(options) if hasattr(other.module, "needs") else other.needs):
            return (
                f"layers are tried out before squared gradients are known, and the step of '{other.name}' weighs by "
                "them: give it another weighting, or leave this step out"
            )
        # Where the decision keeps to the bytes of the recipe's targets, parts may be of any size.
        if not other.replaces(options) and not getattr(self.module, "KEEPS_BUDGET", False):
            return (
                f"which layers the step of '{other.name}' changes is known too late for the size to depend on it: let "
                "it leave plain weights (factored=false)"
            )
        return None

    def completed(self, target: Target) -> Target:
        """The target with the method's own defaults. Rank and ratio stand for each other: either keeps both away."""
        named = {name for name in Target.model_fields if getattr(target, name) is not None}
        if named & {"rank", "ratio"}:
            named |= {"rank", "ratio"}
        return target.model_copy(update={k: v for k, v in self.default.items() if k not in named})

    def parse(self, options: Mapping[str, Any]) -> BaseModel:
        """Options as the method's own type. Raises PlanError that names the option, the rule and the nearest name."""
        known = self.options.model_fields
        for key in options:
            if key not in known:
                raise PlanError(f"method '{self.name}' has no option '{key}'.{nearest(key, known)}")
        try:
            return self.options.model_validate(dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(x) for x in first["loc"])
            raise PlanError(
                f"option '{where}' of method '{self.name}': {first['msg']}, got {first['input']!r}"
            ) from None


def _load(family: str, name: str) -> Method:
    module = importlib.import_module(f"lilliput.methods.{family}.{name}")
    public = name.replace("_", "-")
    return Method(
        name=public,
        family=family,
        verb=VERBS[family],
        summary=(module.__doc__ or "").strip().splitlines()[0],
        paper=module.PAPER,
        needs=frozenset(module.NEEDS),
        writes=module.WRITES,
        covers=module.COVERS,
        recipe=getattr(module, "RECIPE", [{"method": public}]),
        formats=getattr(module, "FORMATS", None),
        rowwise=getattr(module, "ROWWISE", False),
        masked=getattr(module, "MASKED", True),
        default=getattr(module, "DEFAULT", {}),
        double=getattr(module, "DOUBLE", False),
        scratch=getattr(module, "SCRATCH", 0),
        baseline=getattr(module, "BASELINE", None),
        note=getattr(module, "NOTE", None),
        module=module,
    )


@functools.cache
def discover() -> Mapping[str, Method]:
    """All methods by name, found by listing the folders."""
    found: dict[str, Method] = {}
    for family in VERBS:
        package = importlib.import_module(f"lilliput.methods.{family}")
        for info in pkgutil.iter_modules(package.__path__):
            method = _load(family, info.name)
            if method.name in found:
                raise RuntimeError(f"two methods are called {method.name}")
            found[method.name] = method
    return found


def get(name: str) -> Method:
    """The method `name`. Raises PlanError with the nearest name."""
    methods = discover()
    if name not in methods:
        raise PlanError(f"unknown method '{name}'.{nearest(name, methods)}")
    return methods[name]
