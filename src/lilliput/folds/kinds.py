"""Folds: what a rewrite returns. The model computes the same function after every fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lilliput.anatomy.model import Channels, Link


@dataclass(frozen=True)
class ScaleFold:
    """Readers' input channels are multiplied by `scale` [width], the producer's rows divided by it.

    `scale` is positive, finite, float32, and equal where channels share a producer row (see `Link.tie`).
    """

    link: Link
    scale: Tensor


@dataclass(frozen=True)
class ShiftFold:
    """The norm gives `shift` [width] less, float32, and the readers' biases make up for it: b <- b + W shift.

    The link has to be one that can be shifted (`Link.shifts`).
    """

    link: Link
    shift: Tensor


@dataclass(frozen=True)
class HeadFold:
    """Head k of the values is turned by the orthogonal `matrices[k]` [heads, h, h], float64, and what reads it back:
    the producer's rows V_k <- R_kT V_k, its bias alike, the columns of all query heads that read it W <- W R_k.

    `heads` in the order of `Link.heads`; the link has to be one whose heads can be turned (`Link.head`).
    """

    link: Link
    matrices: Tensor


@dataclass(frozen=True)
class PermuteFold:
    """Hidden channel j becomes what channel `order[j]` was, int64 [width]: its rows of the producers and its columns of
    the readers move alike."""

    channels: Channels
    order: Tensor


@dataclass(frozen=True)
class ResidualRotation:
    """An orthogonal change of basis [hidden, hidden], float64, of the whole residual stream.

    Norm gains go into the readers first; readers W <- W R, writers W <- RT W, embedding E <- E R, head likewise.
    """

    matrix: Tensor


@dataclass(frozen=True)
class HeadRotations:
    """`HeadFold`s of many blocks at once: by a block's number the matrices [heads, h, h], float64, of each of its links
    whose heads can be turned, in their order."""

    blocks: Mapping[int, Sequence[Tensor]]


Fold = ScaleFold | ShiftFold | HeadFold | PermuteFold
"""What a rewrite of a block may return."""
