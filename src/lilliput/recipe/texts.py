"""Files that a recipe's options name: what a written folder says of them in place of where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lilliput import methods
from lilliput.data.load import names_file
from lilliput.export.provenance import file_sha256
from lilliput.recipe.schema import Recipe

TEXT = {"names": "text"}
"""`json_schema_extra` of an option that may name a file of text."""


def hashed(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """Own name and sha256 (hex) of each file that options name, in the order of the steps."""
    return tuple(dict.fromkeys((Path(value).name, file_sha256(Path(value))) for _, _, value in _named(recipe)))


def portable(recipe: Recipe) -> Recipe:
    """The recipe with files by their own names, wherever they lay and whether they still do."""
    steps = list(recipe.steps)
    for n, key, value in _named(recipe):
        held: Any = steps[n].options[key]
        own: Any = Path(value).name
        if isinstance(held, Mapping):
            own = {own if name == value else name: weight for name, weight in held.items()}
        steps[n] = steps[n].model_copy(update={"options": {**steps[n].options, key: own}})
    return recipe.model_copy(update={"steps": tuple(steps)})


def _named(recipe: Recipe) -> Iterator[tuple[int, str, str]]:
    """By number of the step and name of the option, the values that name files."""
    for n, step in enumerate(recipe.steps):
        fields = methods.get(step.method).spec.options.model_fields
        for key, value in step.options.items():
            field = fields.get(key)
            text = field is not None and field.json_schema_extra == TEXT
            values = value if isinstance(value, Mapping) else (value,)
            for one in values if text else ():
                if isinstance(one, str) and names_file(one):
                    yield n, key, one
