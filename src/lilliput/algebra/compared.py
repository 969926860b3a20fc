"""Distances between what two models show of the same tokens, and which of their layers stand side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Distance = Literal["l2", "l1", "cosine"]
Scale = Literal["layer", "token", "none"]
_TINY = 1e-12


def side_by_side(blocks: int, teacher_blocks: int, rule: Literal["skip", "last"]) -> tuple[int, ...]:
    """By block of the student, from 1, the block of the teacher whose output its own goes to: every k-th, the last one
    to the last one; or the last ones in their order, and the first one again where the student has more."""
    if rule == "skip":
        return tuple(max(1, round((n + 1) * teacher_blocks / blocks)) for n in range(blocks))
    return tuple(max(1, teacher_blocks - blocks + n + 1) for n in range(blocks))


def distance(ours: Tensor, theirs: Tensor, counts: Tensor, kind: Distance, scale: Scale) -> Tensor:
    """Mean over the tokens that count (bool [B, T]) of the distance of vectors [B, T, H], a scalar.

    l2: mean square of differences; l1: mean size; cosine: 1 - cos. scale: relative to the teacher's own over the layer,
    of vectors of length sqrt(H) ("token"), or as they are. `theirs` gets no gradient.
    """
    a, b = ours.float()[counts], theirs.detach().float()[counts]
    if not len(a):
        return ours.float().sum() * 0.0
    if kind == "cosine":
        return (1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).mean()
    if scale == "token":
        a, b = (x * x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp_min(_TINY) for x in (a, b))
    power = 2 if kind == "l2" else 1
    found = (a - b).abs().pow(power).mean()
    return found / b.abs().pow(power).mean().clamp_min(_TINY) if scale == "layer" else found


def relation(values: Tensor, counts: Tensor) -> Tensor:
    """log softmax(V V^T / sqrt(d)) over the tokens that count, float32 [B, groups, T, T], of V [B, groups, T, d]; -inf
    where a column does not count, but for the token itself. A rotation of V leaves it as it is."""
    scores = values.float() @ values.float().transpose(-1, -2) / values.shape[-1] ** 0.5
    own = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)  # no row is empty
    out: Tensor = scores.masked_fill(~(counts[:, None, None, :] | own), -torch.inf).log_softmax(-1)
    return out


def similarities(states: Tensor, counts: Tensor) -> Tensor:
    """Cosines between all tokens of a row, [B, T, T] of [B, T, H]; 0 where one of them does not count."""
    unit = torch.nn.functional.normalize(states.float(), dim=-1) * counts[..., None]
    return unit @ unit.transpose(-1, -2)


def flow(first: Tensor, second: Tensor, counts: Tensor) -> Tensor:
    """F_1^T F_2 / tokens over the tokens that count, [H, H], of vectors of length sqrt(H): how one layer becomes the
    other."""
    a, b = (x.float()[counts] for x in (first, second))
    a, b = (x * x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True).clamp_min(_TINY) for x in (a, b))
    out: Tensor = a.T @ b / max(len(a), 1)
    return out


def nearest(costs: Sequence[Sequence[Tensor]]) -> tuple[int, ...]:
    """For each row of scalars the number of the least."""
    return tuple(min(range(len(row)), key=lambda n: float(row[n].detach())) for row in costs)
