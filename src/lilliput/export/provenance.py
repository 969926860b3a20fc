"""lilliput.json: where a written folder comes from, and what every tensor in it is. Schema: docs/provenance.md."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from lilliput.errors import SourceError
from lilliput.units import finite

NAME = "lilliput.json"
SCHEMA = 1
_HASHED = 1 << 24  # bytes handed to the hash at a time


@dataclass(frozen=True)
class TensorRow:
    """One stored tensor: its file, torch dtype name, shape, and the sha256 of its bytes."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class LinearRow:
    """One linear: `bits` per weight with all overhead, `error` as the run measured it, seconds spent."""

    name: str
    stored: str
    format: str
    bits: float
    error: float | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataRow:
    """What the run was calibrated on."""

    source: str
    samples: int
    tokens: int
    fingerprint: str


@dataclass(frozen=True)
class TrainingRow:
    """A training step: what was minimised, the mean loss of each step's tokens, and on which text. held_out: (steps,
    loss) on samples that were not trained on; steps: after how many of them the model was kept; stopped: why it ended
    early; teacher: the model that it learned from; adapter: sha256 (hex) of the files that it has put beside the model,
    by their paths in the folder."""

    method: str
    objective: str
    optimizer: str
    data: DataRow
    teacher: str | None
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    steps: int
    seconds: float
    stopped: str | None = None
    adapter: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Provenance:
    """Everything that lilliput.json tells."""

    model: str
    fingerprint: str
    layout: str
    recipe: Mapping[str, Any]
    plan: str
    seed: int | None
    data: DataRow | None
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)
    linears: tuple[LinearRow, ...] = ()
    tensors: tuple[TensorRow, ...] = ()
    training: tuple[TrainingRow, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)  # sha256 (hex) of those that the recipe names
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Sorted and indented, with a final newline: equal provenance gives equal bytes. What is no number is null."""
        return json.dumps(finite(asdict(self)), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read(folder: Path) -> Provenance | None:
    """The folder's lilliput.json; None where there is none. Raises SourceError for a damaged or newer one."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        record = TypeAdapter(Provenance).validate_json(path.read_bytes())
    except (ValidationError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise SourceError(f"{path} is damaged ({first}): write the folder again") from None
    if record.schema != SCHEMA:
        raise SourceError(
            f"{path} has schema {record.schema}, and this lilliput reads {SCHEMA}: use the version that wrote it"
        )
    return record


def file_sha256(path: Path) -> str:
    """Hash of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(tensor: Tensor) -> str:
    """Hash of a tensor's bytes as a file holds them (row-major, little-endian), hex."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256()
    for start in range(0, raw.numel(), _HASHED):
        digest.update(raw[start : start + _HASHED].numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Python and the libraries that shape the result."""
    numbers = {"python": platform.python_version()}
    for name in ("lilliput", "torch", "transformers", "compressed-tensors", "safetensors"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = "not installed"
    return numbers
