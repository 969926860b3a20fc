"""Which block, linear and technique the loss comes from, and which stored tensor looks broken."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.attribution.restore import Restored, restore
from lilliput.attribution.suspects import Suspect, find
from lilliput.attribution.turn import turned_like
from lilliput.attribution.weights import Alignment, WeightLoss, align, compare, is_rotated, producers
from lilliput.data import load_tokens
from lilliput.errors import DataError
from lilliput.machine import memory as ram
from lilliput.metrics import slices
from lilliput.metrics.metric import Metric
from lilliput.metrics.vocabulary import cut, fewer
from lilliput.model.block import BlockWeights
from lilliput.model.stored import Model, open_model

if TYPE_CHECKING:
    from lilliput.progress import Progress

TOP = 8  # linears that are restored one by one
TOKENS = 256  # of a window, where nobody says
_SPARSE = 0.4  # share of zeros that no rounding to 3 bits or more leaves


@dataclass(frozen=True)
class Attribution:
    """What `attribute` found.

    total_kl: KL(original || compressed) on its text, nats per token. blocks: rows {block, output_error, output_snr_db,
    drift, share}; linears: rows {name, block, role, weight_error, output_error, snr_db, share, exact, zeros}, where
    `share` of the KL is what restoring that part alone gives back: by running it where `exact`, else its block's share
    divided by squared output errors. techniques: rows {name, kl, share}. suspects: tensors that look broken.
    """

    total_kl: float
    blocks: tuple[dict[str, Any], ...]
    linears: tuple[dict[str, Any], ...]
    techniques: tuple[dict[str, Any], ...]
    suspects: tuple[Suspect, ...]
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "total_kl": self.total_kl,
            "blocks": list(self.blocks),
            "linears": list(self.linears),
            "techniques": list(self.techniques),
            "suspects": [x.to_json() for x in self.suspects],
            "note": " ".join(self.notes),
            "seconds": self.seconds,
        }


def decibel(error: float) -> float | None:
    """Signal-to-noise ratio of a relative error, in dB; None where there is no noise."""
    return -20.0 * math.log10(error) if error > 0 else None


def suspects(
    model: str | Path | Model, against: str | Path | Model, dtype: torch.dtype = torch.float32
) -> tuple[Suspect, ...]:
    """Tensors of `model` that look damaged beside the original's, by weights alone. Raises as `attribute` does."""
    ours, base, _ = _pair(model, against, dtype)
    return tuple(find(_aligned(ours, base)[1], partial(_stored, ours)))


def _pair(model: str | Path | Model, against: str | Path | Model, dtype: torch.dtype) -> tuple[Model, Model, Model]:
    """The model, the original with the tokens that both have, and the original with all of its own."""
    ours, whole = open_model(model, dtype=dtype), open_model(against, dtype=dtype)
    base = fewer(ours, whole)
    if _shapes(ours) != _shapes(base):
        raise DataError(
            f"'{ours.source.model}' and '{base.source.model}' are made of different tensors, or of other "
            "sizes: they cannot be compared one by one."
        )
    return ours, base, whole


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Tensors but for a head of its own: a rotation unties one that was tied."""
    head = None if model.tied else model.skeleton.head
    return {name: shape for name, shape in model.skeleton.shapes.items() if name != head}


def _losses(ours: Model, base: Model) -> list[WeightLoss]:
    return [x for i in range(len(base.skeleton.block_names)) for x in compare(ours, base, i)]


def _aligned(ours: Model, base: Model) -> tuple[Model, list[WeightLoss]]:
    """The original, in the compressed model's coordinates where that can be, and the weights beside each other."""
    losses = _losses(ours, base)
    alike = turned_like(ours, base) if is_rotated(losses) else None
    return (base, losses) if alike is None else (alike, _losses(ours, alike))


def attribute(
    model: str | Path | Model,
    against: str | Path | Model,
    *,
    data: str | Path = "docs:library",
    windows: int = 2,
    tokens: int | None = None,
    top: int = TOP,
    memory: int | None = None,
    dtype: torch.dtype = torch.float32,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> Attribution:
    """Where a compressed model's divergence from its original comes from.

    Every block is restored by itself, exactly, and so are the `top` linears that the errors point to; the shares of the
    other linears are estimates. Windows have `tokens` tokens: 256, or as many as both models know positions. Costs
    about blocks / 2 forward passes of `windows` windows, and as many products with the head. Tensors are compared
    first, by weights alone: a suspect is found without any checksum. `dtype` is that of models which are not open yet.
    Raises DataError for models of different shapes; of an original that has more tokens (`trim-vocabulary`) those that
    both have take part.
    """
    began = time.monotonic()
    ours, base, whole = _pair(model, against, dtype)
    count = len(base.skeleton.block_names)
    original, losses = _aligned(ours, base)
    damaged = tuple(find(losses, partial(_stored, ours)))
    notes: list[str] = []
    if is_rotated(losses):
        notes.append(
            "The compressed model works in turned coordinates: its blocks cannot take the original's place one by one, "
            "so shares are not given. Where only the residual stream was rotated, the embedding would tell how."
        )
        return Attribution(0.0, (), _rows(losses, None, {}, {}), (), damaged, tuple(notes), time.monotonic() - began)
    fewest = base
    if original is not base:
        notes.append(
            "The compressed model works in turned coordinates: the original was turned like it to be compared."
        )
        base = original
    tokens = slices.tokens([ours, base], tokens, TOKENS)
    ids = load_tokens(data, base.source.tokenizer(), samples=windows, tokens=tokens, vocabulary=base.vocabulary).ids
    if whole is not fewest:
        notes.append(f"The model has {cut(fewest, whole, ids)}.")
    levels = {x.linear: math.log(x.factor) for x in damaged if x.factor > 0 and x.factor != 1.0}
    with tempfile.TemporaryDirectory(prefix="lilliput-eval-", dir=work) as name:
        run = partial(restore, ours, base, ids, Path(name), memory_bytes=memory, progress=progress)
        restored = run(blocks=range(count), outputs=True)
        shares = {i: _share(restored.total, kl) for i, kl in restored.blocks.items()}
        estimated = _estimates(losses, restored, shares)
        suspected = sorted(estimated, key=lambda n: (-estimated[n], n))[:top]
        sparse = [x.name for x in _block_linears(losses) if x.zeros >= _SPARSE]
        again = run(linears=_weights(ours, base, [n for n in suspected if estimated[n] > 0], levels))
        techniques: tuple[dict[str, Any], ...] = ()
        if sparse:
            every = [x.name for x in _block_linears(losses)]
            pruned = run(everywhere=_weights(ours, base, every, levels, pruned=True)).everywhere
            techniques = _techniques(restored.total, pruned if pruned is not None else 0.0)
    exact = {n: _share(again.total, kl) for n, kl in again.linears.items()}
    notes.append(f"Measured on {windows} x {tokens} tokens of {data}.")
    ram.trim()
    return Attribution(
        total_kl=restored.total,
        blocks=tuple(
            {
                "block": i,
                "output_error": restored.block_outputs[i].error,
                "output_snr_db": decibel(restored.block_outputs[i].error),
                "drift": restored.drift[i].error,
                "share": shares[i],
            }
            for i in range(count)
        ),
        linears=_rows(losses, restored, estimated, exact),
        techniques=techniques,
        suspects=damaged,
        notes=tuple(notes),
        seconds=time.monotonic() - began,
    )


def _share(total: float, kl: float) -> float:
    return (total - kl) / total if total > 0 else 0.0


def _techniques(total: float, pruned: float) -> tuple[dict[str, Any], ...]:
    """The zeros alone, put into the original, against what the other values add to that."""
    share = pruned / total if total > 0 else 0.0
    return (
        {"name": "zeros (pruning)", "kl": pruned, "share": share},
        {"name": "values (quantization)", "kl": total - pruned, "share": 1.0 - share},
    )


def _stored(model: Model, name: str, part: str) -> str:
    """Stored name of a tensor's scales or codes; of the tensor itself where it is stored as it is."""
    canonical = name if name in model.refs else f"{name}.weight"
    parts = model.source.parts(model.refs[canonical].stored)
    scales = [x for x in parts if "scale" in x.rsplit(".", 1)[-1]]
    return scales[0] if part == "scale" and scales else parts[0]


def _block_linears(losses: list[WeightLoss]) -> list[WeightLoss]:
    return [x for x in losses if x.linear]


def _estimates(losses: list[WeightLoss], restored: Restored, shares: Mapping[int, float]) -> dict[str, float]:
    """A block's share, divided among its linears by their squared output errors (weight errors where they were not
    run)."""
    linears = _block_linears(losses)
    energy = {
        x.name: (restored.linear_outputs[x.name].error if x.name in restored.linear_outputs else x.error) ** 2
        for x in linears
    }
    whole: dict[int, float] = {}
    for x in linears:
        whole[x.block] = whole.get(x.block, 0.0) + energy[x.name]
    return {
        x.name: max(shares[x.block], 0.0) * energy[x.name] / whole[x.block] if whole[x.block] > 0 else 0.0
        for x in linears
    }


def _weights(
    ours: Model, base: Model, names: list[str], levels: Mapping[str, float], pruned: bool = False
) -> dict[int, dict[str, Callable[[], Tensor]]]:
    """Makers of the original's weights in the compressed model's coordinates and orientation, by block and linear."""
    blocks = base.anatomy().blocks

    @cache
    def aligned(index: int) -> dict[str, Alignment]:
        theirs, mine = BlockWeights(base, index, blocks[index]), BlockWeights(ours, index, blocks[index])
        local = {k.removeprefix(f"{mine.prefix}."): v for k, v in levels.items() if k.startswith(f"{mine.prefix}.")}
        return align(blocks[index], mine, theirs, producers(blocks[index], mine, theirs), local)

    def make(index: int, name: str) -> Tensor:
        theirs, mine = BlockWeights(base, index, blocks[index]), BlockWeights(ours, index, blocks[index])
        linear = blocks[index].linear(name)
        weight = aligned(index)[name].apply(theirs.linear(linear))
        if pruned:
            weight = weight * (mine.linear(linear) != 0)
        return mine.to_stored(linear, weight)

    out: dict[int, dict[str, Callable[[], Tensor]]] = {}
    for name in names:
        index = next(i for i, p in enumerate(base.skeleton.block_names) if name.startswith(f"{p}."))
        local = name.removeprefix(f"{base.skeleton.block_names[index]}.")
        out.setdefault(index, {})[local] = partial(make, index, local)
    return out


def _rows(
    losses: list[WeightLoss], restored: Restored | None, estimated: Mapping[str, float], exact: Mapping[str, float]
) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "name": x.name,
            "block": x.block,
            "role": x.role,
            "weight_error": x.error,
            "output_error": restored.linear_outputs[x.name].error
            if restored and x.name in restored.linear_outputs
            else None,
            "snr_db": decibel(x.error),
            "share": exact.get(x.name, estimated.get(x.name)),
            "exact": x.name in exact,
            "zeros": x.zeros,
        }
        for x in _block_linears(losses)
    )


METRIC = Metric(
    how="lilliput eval DIR --against MODEL --where",
    key="loss.blocks, loss.linears, loss.techniques",
    unit="share of the KL divergence",
    interval="none: of the text at hand",
    covers=("explainability",),
)
