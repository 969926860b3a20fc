"""Text from local files: .txt as it is, .jsonl row by row, without the optional `datasets`; an error names the row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.data.rows import render
from lilliput.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl")
_CHARACTERS = 1 << 16


def _bad_line(path: Path) -> int:
    """Number of the first line that is not UTF-8 (0 when the file changed meanwhile)."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def _blocks(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        while block := file.read(_CHARACTERS):
            yield block


def parse(line: str, where: str) -> Any:
    """A line of a .jsonl file as plain data. Raises DataError, led by `where`, for what is not JSON or not Unicode."""
    try:
        row = json.loads(line)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(
            f"{where} contains {half}, half of a surrogate pair and not a character: repair the text, or write "
            "\\ufffd there."
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None
    except RecursionError:
        raise DataError(f"{where} is nested too deeply to be read: give a row with flat fields.") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise DataError(f"{where} contains a number that cannot be read: {error}.") from None
    return row


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            yield number, parse(line, f"row {number} of '{path}'")


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a .jsonl file. Raises DataError as `pieces` does."""
    check(path)
    with _told(path):
        yield from _rows(path)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:
        raise DataError(f"line {_bad_line(path)} of '{path}' is not UTF-8: convert the file to UTF-8.") from None
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}.") from None


def check(path: Path) -> None:
    """Raises DataError for a file that is not there, or no .txt or .jsonl file."""
    if path.suffix not in SUFFIXES:
        raise DataError(f"'{path}': text is read from {' and '.join(SUFFIXES)} files; rename or convert it.")
    if not path.exists():
        raise DataError(f"there is no file '{path}'.")


def pieces(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Pieces of the file's text, read as they are asked for.

    Raises DataError: no such file, not a .txt or .jsonl file, not readable, not UTF-8 (with the line), bad row (with
    its number).
    """
    check(path)
    with _told(path):
        if path.suffix == ".txt":
            yield from _blocks(path)
        else:
            yield from render(_rows(path), tokenizer, source=str(path))
