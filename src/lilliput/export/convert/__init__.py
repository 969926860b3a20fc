"""Converters: a finished folder to the container of another engine. Codes are carried over; nothing is quantized.

One file a container, which ends with `CONVERTER` and is found by that; the other files are what converters share.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
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


@dataclass(frozen=True)
class Wanted:
    """What else is asked of a container. like: a GGUF file whose metadata and tokenizer are carried over;
    checkpoint_format: how GPTQ's layout holds zero points, "gptq" (less 1) or "gptq_v2" (as they are)."""

    like: Path | None = None
    checkpoint_format: str | None = None

    def only(self, to: str, *known: str) -> None:
        """Raises PlanError for a wish other than the `known` ones, of which the container `to` knows nothing."""
        for name, value in vars(self).items():
            if value is not None and name not in known:
                raise PlanError(f"--{name.replace('_', '-')} says nothing to the container {to}: leave it out")


class Converter(Protocol):
    """One container. Stateless."""

    @property
    def name(self) -> str: ...

    def refuse(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
        """Why the container cannot hold what a plan would write of a model with this config, the whole one, and the
        nearest that it can; None where it can."""
        ...

    def convert(self, folder: Path, out: Path, wanted: Wanted) -> Converted:
        """Write the folder's model to `out`, which must not exist. Raises LilliputError, for a wish that says nothing
        here as well; nothing half-written ever shows at `out`."""
        ...


@functools.cache
def discover() -> Mapping[str, Converter]:
    """All converters by name, found by listing this folder: files that end with `CONVERTER`."""
    found: dict[str, Converter] = {}
    for info in pkgutil.iter_modules(__path__):
        converter = vars(importlib.import_module(f"{__name__}.{info.name}")).get("CONVERTER")
        if converter is not None:
            found[converter.name] = converter
    return found


def get(name: str) -> Converter:
    """The converter `name`. Raises PlanError with the nearest name."""
    known = discover()
    if name not in known:
        raise PlanError(f"nothing is converted to '{name}'.{nearest(name, known)}")
    return known[name]
