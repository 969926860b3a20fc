"""Which inputs of a row share a scale: groups of `size` inputs (-1: the whole row, 0: the whole matrix).

When the size does not divide the width, the last group of each row is shorter; nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def count(width: int, size: int) -> int:
    """Groups in a row of `width` inputs."""
    return 1 if size <= 0 else -(-width // size)


def units(rows: int, width: int, size: int) -> tuple[int, int]:
    """Shape of one value for each group of a [rows, width] matrix; (1, 1) for one per matrix."""
    return (1, 1) if size == 0 else (rows, count(width, size))


def index(width: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """The group of each input, int64 [width]."""
    return torch.arange(width, device=device) // (size if size > 0 else max(width, 1))


def pieces(width: int, size: int) -> Iterator[tuple[slice, slice, int]]:
    """Columns, their groups and the group size: the even part of a row, and its shorter last group if there is one."""
    size = width if size <= 0 else min(size, width)
    even = width // size if size else 0
    if even:
        yield slice(0, even * size), slice(0, even), size
    if even * size < width:
        yield slice(even * size, width), slice(even, even + 1), width - even * size


def split(rows: Tensor, size: int) -> Tensor:
    """[rows, columns] seen as [rows, groups, size]."""
    return rows.view(rows.shape[0], rows.shape[1] // size, size)
