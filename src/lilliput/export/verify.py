"""Whether a written folder is whole: hashes, shapes, finite values, and that the engine it was written for opens it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import LilliputError, SourceError
from lilliput.export.convert import gguf_check
from lilliput.export.engine import look
from lilliput.export.provenance import NAME, Provenance, TensorRow, file_sha256, read
from lilliput.source.gguf import Gguf
from lilliput.source.reader import Reader
from lilliput.source.shards import Shards, pickles

SHOWN = 20  # problems of one kind that are told one by one


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `problems` is empty where it is in order."""

    what: str
    detail: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verification:
    """All checks of a folder. `notes`: what could not be checked, and why."""

    folder: str
    rows: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that is wrong, in words."""
        return tuple(problem for row in self.rows for problem in row.problems)

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain data: folder, whole, problems, notes and every check."""
        return {
            "folder": self.folder,
            "whole": self.whole,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "checks": [asdict(row) for row in self.rows],
        }


def verify(folder: Path, *, memory: int | None = None) -> Verification:
    """Check a folder, or a GGUF file, tensor by tensor, about 16 MB at a time, and what its engine makes of it, within
    `memory` bytes (llama.cpp is a process of its own).

    Problems are reported, not raised. Raises SourceError only where there is no folder and no file.
    """
    if folder.suffix == ".gguf" and folder.is_file():
        return _file(folder)
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder: give one written by `lilliput compress --out`, or a GGUF file")
    rows = [_no_pickles(folder)]
    notes: list[str] = []
    config, check = _config(folder)
    rows.append(check)
    provenance: Provenance | None = None
    try:
        provenance = read(folder)
        if provenance is None:
            notes.append(f"{NAME} is missing: hashes and the list of tensors could not be compared")
    except SourceError as error:
        rows.append(Check(NAME, "read", (str(error),)))
    try:
        reader = Shards(folder)
    except SourceError as error:
        rows.append(Check("weight files", "headers and sizes", (str(error),)))
        return Verification(str(folder), tuple(rows), (*notes, "the weights and the engine were not checked"))
    count = f"{len(reader.entries)} tensors in {len(reader.files)} files"
    rows.append(Check("weight files", count))
    expected = {row.name: row for row in provenance.tensors} if provenance is not None else {}
    if expected:
        rows.append(_listed(expected, reader))
    rows += _contents(expected, reader)
    told = {} if provenance is None else {k: v for x in provenance.training for k, v in x.adapter.items()}
    rows += [_adapter(folder, place, told) for place in _adapters(folder, told)]
    if any(row.problems for row in rows) or config is None:
        notes.append("the engine was not started, because the folder is not whole")
    else:
        row, more = _opens(folder, memory)
        rows.append(row)
        notes += more
    return Verification(str(folder), tuple(rows), tuple(notes))


def _file(path: Path) -> Verification:
    """Check a GGUF file, and that llama.cpp computes what Lilliput's own reader decodes."""
    try:
        reader = Gguf(path)
    except LilliputError as error:
        return Verification(str(path), (Check("GGUF file", "header and sizes", (str(error),)),), ("nothing was read",))
    rows = [Check("GGUF file", f"{len(reader.entries)} tensors"), *_contents({}, reader)]
    if any(row.problems for row in rows):
        return Verification(str(path), tuple(rows), ("the engine was not started on a file that is not whole",))
    try:
        seen = gguf_check.look(path, path)
    except LilliputError as error:
        return Verification(str(path), (*rows, Check("engine", "asked by lilliput", (str(error),))))
    return Verification(str(path), (*rows, Check("engine", seen.detail, _some(list(seen.problems)))), seen.notes)


def _no_pickles(folder: Path) -> Check:
    return Check("no pickles", "", tuple(f"{name} is a pickle, which can run any code" for name in pickles(folder)))


def _config(folder: Path) -> tuple[Any, Check]:
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        return None, Check("config.json", "parses", ("config.json is missing: write or copy the folder again",))
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None, Check("config.json", "parses", (f"transformers cannot read config.json: {first}",))
    return config, Check("config.json", str(config.model_type))


def _listed(expected: Mapping[str, TensorRow], reader: Reader) -> Check:
    """Every tensor that lilliput.json lists, with its file, dtype and shape, and no other."""
    problems: list[str] = []
    for name, row in expected.items():
        entry = reader.entries.get(name)
        if entry is None:
            problems.append(f"tensor {name} is missing from {row.file}")
            continue
        actual = (entry.file.name, str(entry.dtype).removeprefix("torch."), entry.shape)
        if actual != (row.file, row.dtype, row.shape):
            problems.append(
                f"tensor {name} is {actual[1]} {list(actual[2])} in {actual[0]}, {NAME} says {row.dtype} "
                f"{list(row.shape)} in {row.file}"
            )
    problems += [f"tensor {name} is not in {NAME}" for name in reader.entries if name not in expected]
    return Check("tensors", f"{len(expected)} listed in {NAME}", _some(problems))


def _contents(expected: Mapping[str, TensorRow], reader: Reader) -> list[Check]:
    """One pass over all bytes: hashes, and no NaN or infinity."""
    changed: list[str] = []
    infinite: list[str] = []
    for name, entry in reader.entries.items():
        digest, bad = hashlib.sha256(), 0
        try:
            for raw, values in reader.chunks(name):
                digest.update(raw.data)
                bad += _not_finite(values)
        except SourceError as error:
            changed.append(str(error))
            continue
        if bad:
            infinite.append(f"tensor {name} in {entry.file.name} holds {bad} values that are NaN or infinite")
        if name in expected and digest.hexdigest() != expected[name].sha256:
            changed.append(f"tensor {name} in {entry.file.name} is not what was written: its hash differs")
    checks = [Check("finite", f"{len(reader.entries)} tensors", _some(infinite))]
    if expected or changed:
        checks.append(Check("hashes", f"{len(expected)} compared", _some(changed)))
    return checks


def _adapters(folder: Path, told: Mapping[str, str]) -> list[str]:
    """The subfolders with an adapter, or for which one is listed."""
    return sorted({x.parent.name for x in folder.glob("*/adapter_config.json")} | {x.split("/")[0] for x in told})


def _adapter(folder: Path, place: str, told: Mapping[str, str]) -> Check:
    """An adapter's own files: as they were written, readable, and finite. told: their hashes by path."""
    problems = []
    for name, digest in told.items():
        path = folder / name
        if name.startswith(f"{place}/") and not path.is_file():
            problems.append(f"{name} is missing: write or copy the folder again")
        elif name.startswith(f"{place}/") and file_sha256(path) != digest:
            problems.append(f"{name} is not what was written: its hash differs")
    try:
        reader = Shards(folder / place)
    except SourceError as error:
        return Check(f"adapter {place}", "headers and sizes", _some([*problems, str(error)]))
    problems += [problem for row in _contents({}, reader) for problem in row.problems]
    return Check(f"adapter {place}", f"{len(reader.entries)} tensors", _some(problems))


def _not_finite(values: Tensor) -> int:
    if not values.is_floating_point():
        return 0
    if values.itemsize == 1:
        values = values.float()
    return values.numel() - int(torch.isfinite(values).sum())


def _opens(folder: Path, memory: int | None) -> tuple[Check, tuple[str, ...]]:
    """The engine opens the folder and computes what Lilliput's own reader decodes."""
    try:
        result = look(folder, memory=memory)
    except LilliputError as error:
        return Check("engine", "read by lilliput", (str(error),)), ()
    return Check("engine", result.detail, _some(list(result.problems))), result.notes


def _some(problems: list[str]) -> tuple[str, ...]:
    more = len(problems) - SHOWN
    return tuple(problems[:SHOWN]) + ((f"and {more} more of this kind",) if more > 0 else ())
