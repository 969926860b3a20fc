"""The crash-safe work folder: what is finished, under which plan, and who works on it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from lilliput.errors import BusyError, LilliputError


def write_atomically(path: Path, text: str) -> None:
    """The file has its old or its new content, whatever happens in between."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


class Work:
    """The hidden folder beside OUT in which a run lives until its output appears by rename.

    `.OUT.partial/model` becomes OUT; the journal and the activations lie in `.OUT.partial/work`, or in `OUT.work` in
    the folder that the user names with `--work`.
    Raises BusyError while another process holds it, LilliputError when it belongs to another plan.
    """

    def __init__(self, out: Path, plan_hash: str, work: Path | None = None) -> None:
        self.out = out
        self.partial = out.parent / f".{out.name}.partial"
        self.folder = (work / f"{out.name}.work") if work is not None else self.partial / "work"
        self.staging = self.partial / "model"
        self._hash = plan_hash
        self._lock = -1
        self._journal = self.folder / "journal.jsonl"
        self.records: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        if self.out.exists():
            raise LilliputError(f"{self.out} exists already: choose another --out, or move it away first")
        self.staging.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        # The lock lies in the folder that must not be shared, and dies with the process that holds it.
        self._lock = os.open(self.partial / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise BusyError(f"another run is writing {self.out}: wait for it, or choose another --out") from None
        if self.out.exists():
            self._release()
            raise LilliputError(f"{self.out} exists already: choose another --out, or move it away first")
        try:
            self._resume()
        except BaseException:
            self._release()
            raise
        return self

    def _resume(self) -> None:
        if not self._journal.exists():
            write_atomically(self._journal, json.dumps({"plan": self._hash}) + "\n")
            return
        lines = self._journal.read_text(encoding="utf-8").splitlines()
        rows: list[dict[str, Any]] = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # a line cut short by a crash: what it announced is not finished
        found = rows[0].get("plan") if rows else None
        if found != self._hash:
            raise LilliputError(
                f"{self.partial} holds an unfinished run of another plan (model, recipe, data, threads, memory budget "
                "or versions differ): repeat that command to finish it, or delete the folder to start anew"
            )
        self.records = rows[1:]
        if len(rows) != len(lines):
            write_atomically(self._journal, "".join(json.dumps(row) + "\n" for row in rows))

    def note(self, record: Mapping[str, Any]) -> None:
        """Append a record, durably."""
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(dict(record))

    def find(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("kind") == kind]

    def publish(self) -> None:
        """The output appears, whole, by rename; the rest goes."""
        self.staging.rename(self.out)
        parent = os.open(self.out.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.partial, ignore_errors=True)

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __exit__(self, *_: object) -> None:
        self._release()
