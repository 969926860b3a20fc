"""A safetensors file written a few rows at a time, byte for byte as the library writes it from whole tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lilliput.activations import raw
from lilliput.export.folder import safetensors_header


def save_pieces(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    pieces: Callable[[str], Iterator[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Write a file that is there whole or not at all; returns the sha256 (hex) of every tensor's bytes.

    layout: dtype and shape of every tensor; pieces: a tensor, by name, as consecutive rows in that dtype (or as one
    piece). Raises OSError, also for a full disk, and RuntimeError where the pieces do not make up the tensor.
    """
    fresh = path.with_name(f".{path.name}.new")
    header, order = safetensors_header(layout, metadata)
    hashes: dict[str, str] = {}
    with fresh.open("wb") as file:
        file.write(header)
        for name in order:
            dtype, shape = layout[name]
            digest, count = hashlib.sha256(), 0
            for piece in pieces(name):
                if piece.dtype != dtype:
                    raise RuntimeError(f"{name} was planned as {dtype} and comes as {piece.dtype}")
                count += piece.numel()
                if piece.numel():
                    data = raw(piece.detach().contiguous().reshape(-1))
                    digest.update(data)
                    file.write(data)
            if count != prod(shape):
                raise RuntimeError(f"{name} was planned with {prod(shape)} elements and comes with {count}")
            hashes[name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    return hashes
