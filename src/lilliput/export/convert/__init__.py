"""Converters: a finished folder to the container of another engine. Codes are carried over; nothing is quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lilliput.errors import PlanError, nearest
from lilliput.export.outcome import Outcome

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Converted:
    """What was written: bytes of the file or folder, bytes of tensors by their type, what the engine makes of it, what
    a user should know."""

    out: Path
    to: str
    bytes: int
    types: Mapping[str, int]
    engine: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "to": self.to,
            "bytes": self.bytes,
            "types": dict(self.types),
            "engine": self.engine,
            "notes": list(self.notes),
        }


class Converter(Protocol):
    """One container. Stateless."""

    @property
    def name(self) -> str: ...

    def refuse(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
        """Why the container cannot hold what a plan would write, and the nearest that it can; None where it can."""
        ...

    def convert(self, folder: Path, out: Path, like: Path | None = None) -> Converted:
        """Write the folder's model to `out`, which must not exist; `like`: a file of this container whose metadata and
        tokenizer are carried over. Raises LilliputError; nothing half-written ever shows at `out`."""
        ...


def get(name: str) -> Converter:
    """The converter `name`. Raises PlanError with the nearest name."""
    from lilliput.export.convert.gguf import GgufConverter

    known: dict[str, Converter] = {"gguf": GgufConverter()}
    if name not in known:
        raise PlanError(f"nothing is converted to '{name}'.{nearest(name, known)}")
    return known[name]
