"""Names that training wrappers left in a checkpoint, taken off: transformers would not know the tensors by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lilliput.errors import SourceError
from lilliput.source.reader import Entry, Reader

# Submodules that hold the wrapped module: torch.compile, DDP and DeepSpeed, FSDP, activation checkpointing. No language
# model of transformers calls a submodule of its own by one of these names.
SEGMENTS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Unwrapped:
    """A reader whose names have no segments of wrappers.

    With `prefix` names that begin with it begin with `base` instead, and what stands before `base` in it is taken off
    all others. Raises SourceError where two tensors would have one name.
    """

    def __init__(self, reader: Reader, prefix: str = "", base: str = "") -> None:
        self._reader = reader
        self._from: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        outer = prefix.removesuffix(base)
        for stored, entry in reader.entries.items():
            name = ".".join(x for x in stored.split(".") if x not in SEGMENTS)
            if prefix and name.startswith(prefix):
                name = base + name.removeprefix(prefix)
            elif outer and name.startswith(outer):
                name = name.removeprefix(outer)
            if name in self._from:
                raise SourceError(
                    f"{entry.file} holds both {self._from[name]} and {stored}, which are one tensor ({name}) of a "
                    "model and of a wrapper around it: keep one of them."
                )
            self._from[name], self.entries[name] = stored, entry

    @property
    def renamed(self) -> Mapping[str, str]:
        """Name -> name in the files, where they differ."""
        return {name: stored for name, stored in self._from.items() if name != stored}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """See `Reader`."""
        return self._reader.read(self._from[name], rows)

    def chunks(self, name: str) -> Iterator[tuple[NDArray[np.uint8], Tensor]]:
        """See `Reader`."""
        return self._reader.chunks(self._from[name])
