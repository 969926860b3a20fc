"""Answers that a model has given, so that an interrupted evaluation goes on at the item where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


class AnswerStore:
    """Answers by request, in memory and, with a path, as lines of a file that every `put` extends.

    One file belongs to one model in one dtype: `store_for` names it. A line cut short by a kill is left out.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._answers: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        lines = path.read_bytes().split(b"\n")
        for line in lines[:-1]:
            key, answer = json.loads(line)
            self._answers[key] = answer
        if lines[-1]:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - len(lines[-1]))

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, *request: Any) -> Any:
        """The answer to a request (JSON data), or None."""
        return self._answers.get(_key(request))

    def put(self, answer: Any, *request: Any) -> None:
        """Keep an answer (JSON data) to a request."""
        key = _key(request)
        self._answers[key] = answer
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, answer]) + "\n")


def _key(request: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]


def store_for(folder: Path | None, model: Path, *settings: str) -> AnswerStore:
    """Stored answers of a model folder with these settings, in `folder` (made if need be); in memory for None.

    A model is told from another by path and by names, sizes and times of its files: to hash gigabytes takes longer than
    the first items.
    """
    if folder is None:
        return AnswerStore()
    files = [(x.name, x.stat().st_size, x.stat().st_mtime_ns) for x in sorted(model.glob("*")) if x.is_file()]
    return store_in(folder, f"answers-{_key((str(model.absolute()), files, *settings))}")


def store_in(folder: Path | None, name: str) -> AnswerStore:
    """Stored answers under a name in `folder` (made if need be); in memory for None."""
    if folder is None:
        return AnswerStore()
    folder.mkdir(parents=True, exist_ok=True)
    return AnswerStore(folder / f"{name}.jsonl")
