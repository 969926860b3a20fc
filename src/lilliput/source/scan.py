"""One pass over all bytes of a checkpoint: is every number finite, and what is the digest of everything."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lilliput.errors import SourceError
from lilliput.progress import Progress
from lilliput.source.reader import Entry, Reader

SAMPLE = 1 << 12  # elements of each tensor that a quick fingerprint reads


def scan(reader: Reader, finite: bool, progress: Progress | None) -> str:
    """sha256 over every stored byte, in the order of names; each tensor is read once, in chunks.

    Raises SourceError with tensor, file and remedy when a float is NaN or infinite (`finite`) or the file is cut short.
    """
    digest = hashlib.sha256()
    names = sorted(reader.entries)
    for number, name in enumerate(names):
        digest.update(name.encode())
        row = 0
        for raw, values in reader.chunks(name):
            digest.update(raw.data)
            if finite and values.is_floating_point() and values.numel():
                _finite(name, reader.entries[name], values, row)
            row += values.shape[0] if values.dim() else 0
        if progress is not None:
            progress.step(number + 1, len(names), name)
    return digest.hexdigest()


def _finite(name: str, entry: Entry, values: Tensor, row: int) -> None:
    if values.dtype.itemsize == 1:  # 8-bit floats have no arithmetic of their own
        values = values.float()
    low, high = torch.aminmax(values)  # NaN carries through, and no temporary of the tensor's size is made
    if not (torch.isfinite(low) and torch.isfinite(high)):
        wrong = ~torch.isfinite(values.reshape(values.shape[0], -1) if values.dim() else values.reshape(1, 1))
        first = int(wrong.any(dim=1).nonzero()[0]) + row
        kind = "NaN" if torch.isnan(low) or torch.isnan(high) else "an infinite number"
        raise SourceError(
            f"tensor {name} in {entry.file} holds {kind} ({int(wrong.sum())} such values from row {first} on). Nothing "
            "computed from it would mean anything: copy or download the file again, or repair the checkpoint."
        )


def sample(reader: Reader, entries: Mapping[str, Entry]) -> str:
    """sha256 over the first and last rows of every tensor: quick, and blind to a change in between."""
    digest = hashlib.sha256()
    for name in sorted(entries):
        entry = entries[name]
        rows = entry.shape[0] if entry.shape else 0
        if not rows or not entry.nbytes:
            ends: list[tuple[int, int] | None] = [None] if entry.nbytes else []
        else:
            width = max(1, SAMPLE * rows // max(1, torch.Size(entry.shape).numel()))
            ends = [(0, min(rows, width)), (max(0, rows - width), rows)]
        digest.update(name.encode())
        for end in ends:
            digest.update(reader.read(name, end).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
