"""Task files: JSONL rows into items with their worked examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lilliput.data.local import parse as parse_row
from lilliput.errors import DataError
from lilliput.tasks import choice, cloze, generate
from lilliput.tasks.shapes import Row, Shape, shape_of

# What a kind of task can do: item(shape, row, where), example(item), prefixed(item, text), text(item) and
# measure(loaded, shape, items, step).
KINDS: Mapping[str, ModuleType] = {"choice": choice, "cloze": cloze, "generate": generate}


@dataclass(frozen=True)
class Spec:
    """A task as the user named it: NAME=FILE, NAME=FILE+EXAMPLES, KNOWN:LABEL=FILE, NAME=FILE.yaml, or NAME alone.

    entry: the entry of the table that reads the rows (see known.yaml), any other name being a user's own format; file:
    None for a task of the evaluation harness; examples: a file whose first rows are worked examples; definition: the
    harness's own description of the task NAME, None where it knows it.
    """

    name: str
    entry: str
    file: Path | None
    examples: Path | None = None
    definition: Path | None = None


@dataclass(frozen=True)
class Task:
    """Items ready to be scored. fingerprint: sha256 (hex) of shape and items with their examples; categories: what each
    item's row says that it is about, "" for nothing."""

    name: str
    shape: Shape
    items: tuple[Any, ...]
    shots: int
    fingerprint: str
    categories: tuple[str, ...]

    @property
    def kind(self) -> ModuleType:
        return KINDS[self.shape.kind]


def parse(text: str) -> Spec:
    """A task's specification from the command line. Raises DataError for an empty name or file, and where there is no
    file to define a task."""
    name, equals, path = text.strip().partition("=")
    entry = name.partition(":")[0]
    if not entry or (equals and not path):
        raise DataError(
            f"'{text}' is not a task: give NAME=FILE.jsonl, NAME=FILE.jsonl+EXAMPLES.jsonl, NAME=FILE.yaml, or "
            "NAME alone."
        )
    if not equals:
        return Spec(name, entry, None)
    if Path(path).suffix in (".yaml", ".yml"):
        if not Path(path).is_file():
            raise DataError(f"there is no file '{path}' to describe the task '{name}'.")
        return Spec(name, entry, None, definition=Path(path))
    file, plus, examples = path.rpartition("+")
    if not plus or not file or Path(path).exists():
        return Spec(name, entry, Path(path))
    return Spec(name, entry, Path(file), Path(examples))


def rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Line numbers and rows of a JSONL file. Raises DataError that names the line at fault."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"row {number} of '{path}'"
                try:
                    row = parse_row(line.decode("utf-8-sig" if number == 1 else "utf-8"), where)
                except UnicodeDecodeError:
                    raise DataError(f"{where} is not UTF-8: convert the file to UTF-8.") from None
                if not isinstance(row, dict):
                    raise DataError(f"{where}: a row is an object with fields, not {type(row).__name__}.")
                yield number, row
    except FileNotFoundError:
        raise DataError(f"there is no file '{path}'.") from None
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}.") from None


def category(row: Row) -> str:
    """What a row says that it is about, by its field `category` or `subject`; "" where it says nothing."""
    return next((x for x in (row.get("category"), row.get("subject")) if isinstance(x, str)), "")


def _items(path: Path, known: str, count: int | None, shape: Shape | None = None) -> tuple[Shape, list[Any], list[str]]:
    """The shape of the rows, their items, and the items' categories."""
    items: list[Any] = []
    categories: list[str] = []
    for number, row in rows(path):
        if count is not None and len(items) >= count:
            break
        where = f"row {number} of '{path}'"
        if shape is None:
            shape = shape_of(known, row, where)
        problem = shape.problem(row)
        if problem:
            raise DataError(f"{where}: {problem}.")
        items.append(KINDS[shape.kind].item(shape, row, where))
        categories.append(category(row))
    if shape is None:
        raise DataError(f"'{path}' holds no rows: give a JSONL file with one item a line.")
    return shape, items, categories


def load_task(spec: Spec, *, limit: int | None = None, shots: int | None = None) -> Task:
    """Items of a task file, the first `limit` of them, each after `shots` worked examples.

    The examples are the first rows of `spec.examples`; without such a file those of the task file itself, which are
    then not scored. shots: None for what the table says (0 for most). Only rows that are used are read and checked.
    Raises DataError: no such file, a bad row (with its number and field), too few rows.
    """
    if spec.file is None:
        raise DataError(f"the task '{spec.name}' names no file: give {spec.name}=FILE.jsonl.")
    if (limit is not None and limit < 1) or (shots is not None and shots < 0):
        raise DataError(f"limit {limit} and {shots} shots: give at least one item and no negative number of examples.")
    shape, _, _ = _items(spec.file, spec.entry, 1)
    count = shape.shots if shots is None else shots
    ahead = 0 if spec.examples is not None else count
    _, items, categories = _items(spec.file, spec.entry, None if limit is None else ahead + limit, shape)
    examples, items = items[:ahead], items[ahead:]
    if spec.examples is not None:
        examples = _items(spec.examples, spec.entry, count, shape)[1]
    if len(examples) < count or not items:
        short = spec.examples or spec.file
        raise DataError(
            f"'{short}' has too few rows for {count} worked examples"
            f"{'' if spec.examples else ' and one item'}: give more rows or fewer shots."
        )
    kind = KINDS[shape.kind]
    prefix = "".join(f"{kind.example(x)}\n\n" for x in examples)
    ready = tuple(kind.prefixed(x, prefix) for x in items)
    digest = hashlib.sha256(repr((shape, ready)).encode()).hexdigest()
    return Task(spec.name, shape, ready, count, digest, tuple(categories[ahead:]))
