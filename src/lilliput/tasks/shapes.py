"""How rows of known data sets become prompts: the table in known.yaml, and the templates in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from ruamel.yaml import YAML

from lilliput.errors import DataError

Row = Mapping[str, Any]

OWN = "own"
KINDS = ("choice", "cloze", "generate")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "text": lambda x: isinstance(x, str),
    # Exports of one data set hold 3, those of another "3".
    "integer": lambda x: (isinstance(x, int) and not isinstance(x, bool)) or (isinstance(x, str) and x.isdigit()),
    "boolean": lambda x: isinstance(x, bool),
    "texts": _is_texts,
}
_SAID = {"text": "text", "integer": "a whole number", "boolean": "true or false", "texts": "a list of texts"}


@dataclass(frozen=True)
class Shape:
    """One way to read a row; see known.yaml for what the entries mean.

    patterns: metric name -> {pattern, take}, take being first or last match; tokens: the most to generate; ability:
    what the data set asks for, which changes no prompt and so no fingerprint.
    """

    kind: str
    fields: Mapping[str, str]
    metric: str
    context: str = ""
    contexts: str = ""
    choices: str = ""
    target: str = ""
    label: str = ""
    prompt: str = ""
    answer: str = ""
    shown: str = ""
    pattern: str = ""
    delimiter: str = " "
    stop: tuple[str, ...] = ()
    patterns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    shots: int = 0
    tokens: int = 64
    ability: str = field(default="other", repr=False)

    def problem(self, row: Row) -> str:
        """What keeps the row from having this shape, naming the field; empty where nothing does."""
        for name, type_ in self.fields.items():
            optional = type_.endswith("?")
            if name not in row:
                if optional:
                    continue
                return f"there is no field '{name}', only {', '.join(map(repr, row)) or 'none'}"
            known = type_.removesuffix("?")
            if not _TYPES[known](row[name]) and not (optional and row[name] is None):
                return f"'{name}' must be {_SAID[known]}, not {row[name]!r}"
        return ""

    def text(self, template: str, row: Row) -> str:
        """A template of this shape filled from the row."""
        return str(_template(template).render(self._values(row)))

    def value(self, expression: str, row: Row) -> Any:
        """An expression of this shape over the row; None where it gives nothing."""
        return _expression(expression)(**self._values(row))

    def _values(self, row: Row) -> dict[str, Any]:
        return {name: row.get(name) for name in self.fields}


def _without_brackets(text: str) -> str:
    """HellaSwag's WikiHow rows carry [title], [step] and the like."""
    import re

    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@cache
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["without_brackets"] = _without_brackets
    return environment


@cache
def _template(text: str) -> Any:
    return _environment().from_string(text)


@cache
def _expression(text: str) -> Any:
    return _environment().compile_expression(text)


def _flat(entries: Iterable[Any]) -> list[Any]:
    return [x for entry in entries for x in (_flat(entry) if isinstance(entry, list) else [entry])]


@cache
def table() -> Mapping[str, tuple[Shape, ...]]:
    """Known data sets by name, each with the shapes that its rows may have."""
    text = resources.files("lilliput.tasks").joinpath("known.yaml").read_text(encoding="utf-8")
    raw: dict[str, list[Any]] = YAML(typ="safe", pure=True).load(text)
    return {
        name: tuple(Shape(**{**entry, "stop": tuple(entry.get("stop", ()))}) for entry in _flat(entries))
        for name, entries in raw.items()
    }


def ability_of(name: str) -> str:
    """What a data set asks for, by the name that it has in the table, or in the harness, whose subsets begin with it
    (bbh_cot_fewshot_navigate)."""
    shapes = table()
    match = max((x for x in shapes if name == x or name.startswith(f"{x}_")), key=len, default=OWN)
    return shapes[match][0].ability


def shape_of(name: str, row: Row, where: str) -> Shape:
    """The shape of a data set's first row; `name` not in the table means a user's own format.

    Raises DataError that names the field at fault, or for a row of no known format the formats there are.
    """
    shapes = table().get(name, table()[OWN])
    problems = [shape.problem(row) for shape in shapes]
    for shape, problem in zip(shapes, problems, strict=True):
        if not problem:
            return shape
    if len(problems) == 1:
        raise DataError(f"{where}: {problems[0]}.")
    formats = "; ".join(f"{x.kind} ({', '.join(x.fields)})" for x in shapes)
    # The shape that shares most fields is what was meant.
    shared = [sum(name in row for name in shape.fields) for shape in shapes]
    nearest = problems[shared.index(max(shared))]
    raise DataError(f"{where}: {nearest}. Rows may be {formats}.")
