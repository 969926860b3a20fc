"""What a change of basis of the residual stream touches in a model, tried out on random weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lilliput.anatomy.model import Anatomy
from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import PlanError, SourceError
from lilliput.model.weights import Model

TOLERANCE = 1e-4  # relative change of logits in float32
VOCABULARY = 64  # rows of the embedding on which the rotation is tried out


@dataclass(frozen=True)
class Outside:
    """What an orthogonal change of basis touches beyond the blocks. `norm`: the final norm's gain, offset + weight."""

    embeddings: tuple[str, ...]
    norm: str | None
    offset: float


@dataclass(frozen=True)
class Change:
    """How a rotation enters one tensor.

    kind: "gain" (moved away), "reader" (W R), "writer" (RT W), "bias" (b R, a writer's) or "outside" (rows R). place:
    which basis. gain: the norm whose offset + weight enters the columns first.
    """

    kind: str
    place: int
    transposed: bool = False
    gain: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Residual:
    """A model's residual stream: its skeleton and anatomy with the head untied, for the gain of the final norm goes
    into the head alone; what takes part outside the blocks; and how a rotation enters each tensor that it changes."""

    skeleton: Skeleton
    anatomy: Anatomy
    outside: Outside
    changes: Mapping[str, Change]


def residual(model: Model) -> Residual:
    """What there is to turn in a model. Raises PlanError with the reason where nothing is."""
    skeleton = _untied(model.skeleton)
    anatomy = replace(model.anatomy(), tied=False, head=skeleton.head)
    outside = verify(skeleton, anatomy)
    return Residual(skeleton, anatomy, outside, _changes(anatomy, outside, skeleton))


def _changes(anatomy: Anatomy, outside: Outside, skeleton: Skeleton) -> Mapping[str, Change]:
    changes: dict[str, Change] = {}
    last = len(anatomy.blocks)
    for i, (prefix, block) in enumerate(zip(anatomy.block_names, anatomy.blocks, strict=True)):
        offsets = {x.producer: x.offset for x in block.links if x.kind == "norm"}
        linears = {x.name: x for x in block.linears}
        for norm, readers in block.residual_readers:
            gain = f"{prefix}.{norm}.weight"
            changes[gain] = Change("gain", i, offset=offsets[norm])
            for name in readers:
                flipped = linears[name].transposed
                changes[f"{prefix}.{name}.weight"] = Change("reader", i, flipped, gain, offsets[norm])
        for name in block.residual_writers:
            changes[f"{prefix}.{name}.weight"] = Change("writer", i, linears[name].transposed)
            if linears[name].bias:
                changes[f"{prefix}.{name}.bias"] = Change("bias", i)
    for name in outside.embeddings:
        changes[name] = Change("outside", 0)
    changes[skeleton.head] = Change("outside", last, gain=outside.norm, offset=outside.offset)
    if outside.norm is not None:
        changes[outside.norm] = Change("gain", last, offset=outside.offset)
    return changes


def _untied(skeleton: Skeleton) -> Skeleton:
    if not skeleton.tied:
        return skeleton
    config = copy.deepcopy(skeleton.config)
    config.tie_word_embeddings = False
    return Skeleton(config, dtype=skeleton.dtype, device=skeleton.device)


def verify(skeleton: Skeleton, anatomy: Anatomy) -> Outside:
    """What lies outside the blocks and takes part, tried out with random weights on a small vocabulary.

    The blocks were tried when the anatomy was found. Raises PlanError with the reason.
    """
    for block in anatomy.blocks:
        if not block.residual_readers:
            why = [x for x in block.notes if "rotated" in x]
            raise PlanError(
                f"{anatomy.architecture}: {why[0] if why else 'its blocks were not understood'}. Only plain RMS norms, "
                "read by linears, commute with a rotation: leave the rotation out of the recipe"
            )
    small = _small(skeleton)
    rng = torch.Generator().manual_seed(0)
    names = (*small.embeddings, *small.final, *(n for n in small.shapes if n.startswith(small.head.rpartition(".")[0])))
    tensors = {n: torch.randn(small.shapes[n], generator=rng) for n in names}
    width = small.hidden_size
    embeddings = tuple(n for n in small.embeddings if small.shapes[n][-1] == width and len(small.shapes[n]) == 2)
    norm = small.final[0] if len(small.final) == 1 and small.shapes[small.final[0]] == (width,) else None
    ids = torch.arange(8).view(2, 4)
    rotated = {n: _reflect(v) if n in embeddings else v for n, v in tensors.items()}
    hidden = _embedded(small, tensors, ids)
    if _apart(_embedded(small, rotated, ids), _reflect(hidden)) > TOLERANCE:
        raise PlanError(
            f"{anatomy.architecture} cannot be rotated: its embedding is more than a table of rows; leave the rotation "
            "out of the recipe"
        )
    with torch.no_grad():
        small.load(tensors)
        expected = small.logits(small.finish(hidden))
        for offset in (0.0, 1.0):
            gain = torch.ones(width) if norm is None else tensors[norm] + offset
            small.load({small.head: _reflect(tensors[small.head] * gain)})
            if norm is not None:
                small.load({norm: torch.full((width,), 1.0 - offset)})
            if _apart(small.logits(small.finish(_reflect(hidden))), expected) <= TOLERANCE:
                return Outside(embeddings, norm, offset)
    raise PlanError(
        f"{anatomy.architecture} cannot be rotated: its final norm and head do not commute with a rotation (only plain "
        "RMS norms do); leave the rotation out of the recipe"
    )


def _small(skeleton: Skeleton) -> Skeleton:
    """The skeleton with a small vocabulary, in float32, so that its embedding and head cost nothing."""
    config = copy.deepcopy(skeleton.config)
    config.vocab_size = VOCABULARY
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, token, None) is not None:
            setattr(config, token, None if token == "pad_token_id" else 1)
    try:
        return Skeleton(config)
    except (SourceError, ValueError, TypeError, RuntimeError) as error:
        raise PlanError(f"no small copy of this model can be built for trying a rotation: {error}") from None


def _embedded(skeleton: Skeleton, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    skeleton.load({n: tensors[n] for n in skeleton.embeddings})
    return skeleton.embed(ids)[0]


def _reflect(x: Tensor) -> Tensor:
    """x [.., n] times a dense orthogonal matrix that is not its own transpose, without building it."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(2):
        v = torch.randn(x.shape[-1], generator=rng)
        x = x - 2 * (x @ v)[..., None] * v / (v @ v)
    return x


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
