"""The method index: what `lilliput methods` says, from the method files themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import PydanticUndefined

from lilliput.errors import PlanError, nearest
from lilliput.methods import discover
from lilliput.verbs.spec import Method, Steps


def index() -> list[dict[str, Any]]:
    """One entry per method, as plain data, sorted by name.

    `covers` lists the catalogue ids that the file implements, each with the `recipe` that runs it, or with
    `documentation: true` where the id is an idea and no computation, or with `why` it cannot be run yet as well.
    `no_recipe` says why no recipe runs the method, where none does.
    """
    return [entry(method) for _, method in sorted(discover().items())]


def entry(method: Method) -> dict[str, Any]:
    """A method's entry of the index."""
    return {
        "name": method.name,
        "verb": method.spec.verb,
        "family": method.spec.family,
        "summary": method.summary,
        "paper": method.spec.paper,
        "needs": sorted(method.spec.needs),
        "writes": method.spec.writes,
        "baseline": method.spec.baseline,
        "covers": [_covered(key, steps) for key, steps in method.spec.covers.items()],
        "no_recipe": method.recipe if isinstance(method.recipe, str) else None,
        "options": options(method),
    }


def _covered(key: str, steps: Steps | str | None) -> dict[str, Any]:
    if isinstance(steps, list):
        return {"id": key, "recipe": {"steps": steps}}
    return {"id": key, "documentation": True, **({} if steps is None else {"why": steps})}


def options(method: Method) -> list[dict[str, Any]]:
    """Name, type, default and meaning of each option of a method."""
    return [
        {
            "name": name,
            "type": _type_name(field.annotation),
            "default": None if field.default is PydanticUndefined else field.default,
            "description": field.description or "",
        }
        for name, field in method.options.model_fields.items()
    ]


def covering() -> Mapping[str, Method]:
    """Catalogue id to the method that covers it. Raises RuntimeError where two files claim one id."""
    by_id: dict[str, Method] = {}
    for method in discover().values():
        for key in method.spec.covers:
            if key in by_id:
                raise RuntimeError(f"both '{by_id[key].name}' and '{method.name}' cover '{key}'")
            by_id[key] = method
    return by_id


def find(name: str, also: Iterable[str] = ()) -> Method:
    """The method called `name`, or the one that covers this catalogue id.

    Raises PlanError with the nearest name; `also` are further names to hint at.
    """
    name = name.replace("_", "-")
    methods, ids = discover(), covering()
    if name not in methods and name not in ids:
        raise PlanError(f"unknown method, recipe or catalogue id '{name}'.{nearest(name, {*methods, *ids, *also})}")
    return methods[name] if name in methods else ids[name]


def steps_of(name: str, also: Iterable[str] = ()) -> Steps:
    """Steps that run a catalogue id, or a method as its file says it is run by default. Raises PlanError that says why
    where nothing does."""
    name = name.replace("_", "-")
    method = find(name, also)
    steps = method.spec.covers.get(name, method.recipe if name == method.name else None)
    if isinstance(steps, list):
        return steps
    advice = f"read about it with `lilliput methods {method.name}`"
    if steps is None:
        raise PlanError(f"'{name}' is an idea, not a computation: {advice}")
    raise PlanError(f"no recipe runs '{name}': {steps}; {advice}")


def _type_name(annotation: object) -> str:
    """`int`, `int or none`, `"a" or "b"`: a type as a reader says it."""
    from types import NoneType, UnionType
    from typing import Literal, Union, get_args, get_origin

    if annotation is NoneType:
        return "none"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type_name(x) for x in get_args(annotation))
    if get_origin(annotation) is Literal:
        return " or ".join(f'"{x}"' if isinstance(x, str) else str(x) for x in get_args(annotation))
    return getattr(annotation, "__name__", str(annotation))
