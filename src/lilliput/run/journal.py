"""The crash-safe work folder: what is finished, under which plan, and who works on it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lilliput.errors import BusyError, LilliputError, PlanError, SourceError
from lilliput.export import provenance
from lilliput.machine import ranks
from lilliput.units import size as readable

JOURNAL = "journal.jsonl"
_PASSING = "lilliput-eval-*"  # folders of an evaluation, of no use once it was interrupted
_RANK = "rank-*"  # folders of the other processes of a run


def write_atomically(path: Path, text: str) -> None:
    """The file has its old or its new content, whatever happens in between."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def save_atomically(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file that is there whole or not at all. Raises OSError, also for a full disk."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        fresh.touch()
        mode = fresh.stat().st_mode  # as the umask has it; the library's files are for their owner alone
        save_file(dict(tensors), fresh, None if metadata is None else dict(metadata))
        fresh.chmod(mode)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
    with fresh.open("rb+") as file:
        os.fsync(file.fileno())
    fresh.replace(path)


def partial_of(out: Path) -> Path:
    """The hidden folder beside `out` in which an unfinished run lives."""
    return out.parent / f".{out.name}.partial"


def work_of(out: Path, work: Path | None) -> Path:
    """Where journal and activations lie: in the hidden folder, or in a folder of its own inside `work`.

    The name tells outputs of one name but in different places apart, so that they can share `work`.
    """
    if work is None:
        return partial_of(out) / "work"
    return work / f"{out.name}-{hashlib.sha256(str(out).encode()).hexdigest()[:8]}.lilliput"


def first_facts(out: Path, work: Path | None) -> Mapping[str, Any]:
    """What the unfinished run for `out` noted when it began; empty where there is none."""
    try:
        with (work_of(out, work) / JOURNAL).open(encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    return first if isinstance(first, dict) else {}


def published(out: Path, work: Path | None) -> bool:
    """Whether `out` was put there by a run that was killed before it had cleared away its journal."""
    if (partial_of(out) / "model").exists():
        return False
    try:
        record = provenance.read(out)
    except (SourceError, OSError):
        return False
    return record is not None and record.plan == first_facts(out, work).get("plan")


def room(work: Path, size: int) -> None:
    """Raises PlanError unless the disk of `work`, which need not exist yet, takes `size` bytes of activations beside
    those of runs that are there already."""
    place = next(x for x in (work, *work.parents) if x.exists())
    used = sum(x.stat().st_size for x in work.glob("*.lilliput/**/*") if x.is_file())
    free = shutil.disk_usage(place).free + used
    if free < size:
        raise PlanError(
            f"the disk of {work} has {readable(free)} free but {readable(size)} of activations will be written: free "
            "some space, or name another place with --work"
        )


class Work:
    """The hidden folder beside OUT in which a run lives until its output appears by rename.

    `.OUT.partial/model` becomes OUT; the journal and the activations lie in `.OUT.partial/work`, or in a folder of
    their own in the folder that the user names with `--work`. `facts` are noted when a run begins, for `first_facts`.
    Raises BusyError while another process holds it, LilliputError when it belongs to another plan or when OUT exists. A
    run that fails before its first record leaves no files.

    Of several processes the leader holds the folder and writes. The others keep their activations in a folder `rank-N`
    inside, know the same records, and never write to `staging`.
    """

    def __init__(
        self, out: Path, plan_hash: str, work: Path | None = None, facts: Mapping[str, Any] | None = None
    ) -> None:
        self.out = out
        self.partial = partial_of(out)
        self.folder = work_of(out, work)
        self.staging = self.partial / "model"
        self._elsewhere = work
        self._header = {**(facts or {}), "plan": plan_hash}
        # The lock lies in the folder that must not be shared, and the system frees it when its process dies, however.
        self._lock = FileLock(self.partial / "lock", blocking=False, thread_local=False)
        self._journal = self.folder / JOURNAL
        self.records: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        with ranks.together():
            if ranks.lead():
                self._begin()
        self.records = ranks.agreed(self.records)
        if not ranks.lead():
            self.folder = self.folder / _RANK.replace("*", str(ranks.rank()))
            self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def _begin(self) -> None:
        if os.path.lexists(self.out) and not published(self.out, self._elsewhere):
            raise _exists(self.out)
        self.partial.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise BusyError(f"another run is writing {self.out}: wait for it, or choose another --out") from None
        try:
            self._resume()
        except BaseException:
            self._lock.release()
            raise

    def _resume(self) -> None:
        if os.path.lexists(self.out):
            if not published(self.out, self._elsewhere):
                raise _exists(self.out)
            self._compare(first_facts(self.out, self._elsewhere).get("plan"))
            self.out.rename(self.staging)  # the last step is done again, for its report
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._journal.exists():
            for folder in self.folder.glob(f"{_RANK}/"):  # a run that ended while its other processes began
                shutil.rmtree(folder, ignore_errors=True)
            if any(path.name != f".{JOURNAL}.new" for path in self.folder.iterdir()):
                raise LilliputError(
                    f"{self.folder} holds files but no journal, so no run of lilliput wrote them: choose another "
                    "--work, or move the folder away"
                )
            if self.staging.is_dir() and any(self.staging.iterdir()):
                raise LilliputError(
                    f"{self.partial} holds an unfinished run whose journal is not in {self.folder}: repeat that "
                    "command with its --work to finish it, or delete the folder to start again"
                )
            self.staging.mkdir(exist_ok=True)
            write_atomically(self._journal, json.dumps(self._header) + "\n")
            return
        text = self._journal.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()
        rows: list[dict[str, Any]] = []
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # a line cut short by a crash: what it announced is not finished
            if not isinstance(row, dict):
                break
            rows.append(row)
        self._compare(rows[0].get("plan") if rows else None)
        self.staging.mkdir(exist_ok=True)
        self.records = rows[1:]
        if len(rows) != len(lines) or not text.endswith("\n"):
            write_atomically(self._journal, "".join(json.dumps(row) + "\n" for row in rows))
        for folder in self.folder.glob(_PASSING):
            shutil.rmtree(folder, ignore_errors=True)

    def _compare(self, value: object) -> None:
        if value != self._header["plan"]:
            raise LilliputError(
                f"{self.partial} holds an unfinished run of another plan (model, recipe, data, threads, memory budget, "
                "processes or versions differ): repeat that command to finish it, or delete the folder to start again"
                + ("" if self._elsewhere is None else f", and {self.folder} with it")
            )

    def need(self, out: int, work: int) -> None:
        """Raises PlanError unless the disks take `out` bytes of model and `work` bytes of activations.

        What an earlier run has written of them already counts.
        """
        needs: dict[int, tuple[Path, int]] = {}
        for folder, size in ((self.staging, out), (self.folder, work)):
            used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            place, before = needs.get(folder.stat().st_dev, (folder, 0))
            needs[folder.stat().st_dev] = place, before + max(size - used, 0)
        for folder, size in needs.values():
            free = shutil.disk_usage(folder).free
            if free < size:
                raise PlanError(
                    f"the disk of {folder} has {readable(free)} free but {readable(size)} will be written, "
                    f"{readable(size - free)} more: free some space, or name other places with --out and --work"
                )

    def note(self, record: Mapping[str, Any]) -> None:
        """Append a record, durably. Every rank calls it, waits for it, and knows the leader's record afterwards."""
        if ranks.lead():
            with self._journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.records.append(dict(ranks.agreed(record)))

    def find(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("kind") == kind]

    def hashes(self) -> dict[str, str]:
        """sha256 (hex) of every tensor of the output that is finished, by stored name."""
        hashes: dict[str, str] = {}
        for record in (*self.find("outside"), *self.find("block"), *self.find("table"), *self.find("trained")):
            hashes.update(record["sha256"])
        return hashes

    def keep(self, files: Sequence[str]) -> None:
        """Delete what is in the work folder, except for the journal and these files."""
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in {JOURNAL, *files}:
                path.unlink()

    def publish(self) -> None:
        """The output appears, whole, by rename; the rest goes. The other ranks leave when it is there."""
        if ranks.lead():
            self._publish()
        try:
            ranks.agreed(None)
        except LilliputError:
            if not ranks.lead():  # to whom it does not matter any more who is gone
                raise

    def _publish(self) -> None:
        for path in self.staging.glob(".*.new"):
            path.unlink()
        if os.path.lexists(self.out):
            raise _exists(self.out)
        self.staging.rename(self.out)
        parent = os.open(self.out.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
        self._clear()

    def _clear(self) -> None:
        """Remove all that is not the output. The journal goes last: as long as it lies there, a run can go on."""
        for path in self.folder.iterdir():
            if path != self._journal:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.partial, ignore_errors=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if ranks.lead() and kind is not None and not self.records:
            self._clear()
        self._lock.release()


class Losses:
    """Losses that a step asks for in the same order whenever it runs, each a record of the journal: what an earlier
    part of the run has measured is not measured again. `asked`: how many were asked for so far."""

    def __init__(self, work: Work, kind: str, step: int) -> None:
        self._work, self._kind, self._step = work, kind, step
        self._known = [float(r["loss"]) for r in work.find(kind) if r["step"] == step]
        self.asked = 0

    def next(self, measure: Callable[[], float]) -> float:
        """The next one, measured where it is not known."""
        self.asked += 1
        if self.asked > len(self._known):
            value = measure()
            self._work.note({"kind": self._kind, "step": self._step, "loss": value})
            self._known.append(value)
        return self._known[self.asked - 1]


def _exists(out: Path) -> LilliputError:
    return LilliputError(f"{out} exists already: choose another --out, or move it away first")
