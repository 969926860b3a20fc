"""Folds: what a rewrite returns. The model computes the same function after every fold."""

from __future__ import annotations

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


Fold = ScaleFold | PermuteFold
"""What a rewrite of a block may return."""
