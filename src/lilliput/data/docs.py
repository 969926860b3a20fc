"""English text that every Python installation carries: no network, no files of our own, no licence to ask for.

What it is: technical English about Python, with code in it. "docs:reference" is the language reference as `help()`
shows it (pydoc's topics, about 65,000 words), "docs:library" the docstrings of the standard library of 20 words and
more (about 165,000 words), and "docs" the first followed by the second. The two halves share no text, so one can
calibrate and the other evaluate. It differs between Python versions: the fingerprint tells. It is narrower than web
text: a model calibrated on prose of its own field comes out better.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import itertools
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from lilliput.errors import DataError

SOURCES = ("docs", "docs:reference", "docs:library")
MIN_WORDS = 20
# Parts of the standard library that distributions leave out or pack separately.
_ABSENT = frozenset({"distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtledemo", "venv"})


def _reference() -> Iterator[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        yield topics[name].strip()


def _library() -> Iterator[str]:
    return copy.copy(_start(Path(sysconfig.get_path("stdlib"))))


@functools.cache
def _start(root: Path) -> Iterator[str]:
    """Never moved on itself; its copies share what the furthest of them has read, for parsing takes seconds."""
    (texts,) = itertools.tee(_docstrings(root), 1)
    return texts


def _docstrings(root: Path) -> Iterator[str]:
    modules_read: set[str] = set()
    for name in sorted(sys.stdlib_module_names - _ABSENT):
        module = root / f"{name}.py"
        files = [module] if module.is_file() else sorted((root / name).glob("**/*.py"))
        for file in files:
            folders = file.relative_to(root).parts
            if name.startswith("_") or "test" in folders or "tests" in folders:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a doubtful escape in someone's source is not this program's business
                tree = ast.parse(file.read_bytes())
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = (ast.get_docstring(node) or "").strip()
                    if len(text.split()) >= MIN_WORDS and text not in modules_read:
                        modules_read.add(text)
                        yield text


def pieces(source: str = "docs") -> Iterator[str]:
    """Pieces of "docs", "docs:reference" or "docs:library", parted by blank lines, in the same order on every call.

    Raises DataError when this Python was installed without its documentation.
    """
    first = True
    for part, texts in (("docs:reference", _reference), ("docs:library", _library)):
        if source in ("docs", part):
            for text in texts():
                yield text if first else "\n\n" + text
                first = False
    if first:
        raise DataError(f"this Python has no text for '{source}': give a .txt or .jsonl file instead.")
