"""Every tensor of the output before it exists: its name, kind, exact size and file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from lilliput import export
from lilliput.export.folder import SHARD, model_config, safetensors_bytes
from lilliput.export.outcome import Outcome
from lilliput.machine import memory
from lilliput.model import weights
from lilliput.model.stored import Model

METADATA = {"format": "pt"}
LARGE = frozenset({"embedding", "head", "untied head", "carried"})  # kinds of tensors that may be large
BEHAVIOUR = "behaviour"  # kind of the tensors that say how the model runs
PIECE = 16 * memory.MB  # of a tensor with more than two axes


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output: stored name, what it is, and its exact place."""

    name: str
    kind: str  # "quantized", "linear", "norm", "embedding", "head", "carried", ...
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: int
    block: int | None  # None: outside the blocks
    source: str  # canonical (or, for carried ones, stored) name it comes from

    @property
    def nbytes(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize


def rows_at_a_time(shape: tuple[int, ...]) -> int:
    """How many rows of a tensor outside the blocks are in memory at a time, while they are read and written."""
    if len(shape) <= 2:
        return weights.TABLE_ROWS
    return max(1, PIECE // (4 * prod(shape[1:])))


def at_a_time(tensor: TensorPlan) -> int:
    """Bytes that a tensor outside the blocks takes while it is written: rows as stored, in float32 and as written."""
    rows = min(rows_at_a_time(tensor.shape), tensor.shape[0]) if tensor.shape else 1
    return rows * prod(tensor.shape[1:]) * (4 + 4 + tensor.dtype.itemsize)


def kind_of(name: str, model: Model) -> str:
    """What a tensor that is not quantized is: "embedding", "head", "untied head", "norm", "bias" or "linear"."""
    skeleton = model.skeleton
    if name in skeleton.embeddings:
        return "embedding"
    if name == skeleton.head and any(model.refs[name] == model.refs[x] for x in skeleton.embeddings):
        return "untied head"  # stored once before, twice from now on
    if name == skeleton.head or name.startswith(skeleton.head.rsplit(".", 1)[0] + "."):
        return "head"
    if "norm" in name.rsplit(".", 2)[-2].lower() or name in skeleton.final:
        return "norm"
    if name.endswith(".bias"):
        return "bias"
    return "linear"


def lay_out(
    model: Model,
    exporter: export.Exporter,
    outcomes: Mapping[str, Outcome],
    added: Mapping[int, Mapping[str, tuple[torch.dtype, tuple[int, ...]]]] | None = None,
) -> tuple[tuple[TensorPlan, ...], tuple[str, ...]]:
    """All tensors of the output in the order of their work, those outside the blocks first, and the names of its files.

    added: dtype and shape by name, by block, of tensors that no model of this class has: those of behaviours.
    A file takes the tensors that come next, up to `SHARD` bytes; one that is larger by itself has a file of its own.
    """
    skeleton = model.skeleton
    blocks = {name: n for n in range(len(skeleton.block_names)) for name in skeleton.names_of(n)}
    planned: list[TensorPlan] = []
    for name in (x for x in skeleton.shapes if x not in blocks):
        table = outcomes.get(name.removesuffix(".weight"))
        if table is not None:
            entries = exporter.describe(table).items()
            planned += [TensorPlan(n, "quantized", dtype, tuple(s), 0, None, table.name) for n, (dtype, s) in entries]
            continue
        kind, dtype = kind_of(name, model), model.written_dtype(name)
        planned.append(TensorPlan(model.stored_name(name), kind, dtype, model.shape(name), 0, None, name))
    stored = model.source.stored
    planned += [
        TensorPlan(name, "carried", stored[name].dtype, stored[name].shape, 0, None, name) for name in model.carried
    ]
    for canonical, block in blocks.items():
        linear = canonical.removesuffix(".weight")
        outcome = outcomes.get(linear) if canonical.endswith(".weight") else None
        if outcome is not None:
            kind = "quantized" if outcome.scheme.parts else "linear"
            for name, (dtype, shape) in exporter.describe(outcome).items():
                planned.append(TensorPlan(name, kind, dtype, tuple(shape), 0, block, linear))
        else:
            name, shape = model.stored_name(canonical), model.shape(canonical)
            dtype = model.written_dtype(canonical)
            planned.append(TensorPlan(name, kind_of(canonical, model), dtype, shape, 0, block, canonical))
    for number, own in (added or {}).items():
        planned += [TensorPlan(n, BEHAVIOUR, dtype, shape, 0, number, n) for n, (dtype, shape) in own.items()]
    return _shared_out(planned)


def _shared_out(planned: Sequence[TensorPlan]) -> tuple[tuple[TensorPlan, ...], tuple[str, ...]]:
    shard, filled = 0, 0
    placed: list[TensorPlan] = []
    for tensor in planned:
        # A file by itself is more than its share of a header, except for offsets of more digits.
        share = safetensors_bytes({tensor.name: (tensor.dtype, tensor.shape)}, METADATA) + 2 * len(str(SHARD))
        if filled and filled + share > SHARD:
            shard, filled = shard + 1, 0
        filled += share
        placed.append(replace(tensor, shard=shard))
    count = shard + 1
    if count == 1:
        return tuple(placed), ("model.safetensors",)
    return tuple(placed), tuple(f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count))


def config_dtype(model: Model) -> torch.dtype:
    """The dtype that the output's config names, in which engines run it: the one that most tensors have."""
    names = list(model.skeleton.shapes)
    stored = {model.written_dtype(name) for name in names}
    return max(stored, key=lambda t: sum(model.written_dtype(n) == t for n in names))


def written_config(model: Model, quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json of the output as plain data."""
    return model_config(
        model.config,
        quantization=quantization,
        dtype=config_dtype(model),
        tied=model.tied,
        architecture=type(model.skeleton.model).__name__,
        raw=model.raw,
    )
