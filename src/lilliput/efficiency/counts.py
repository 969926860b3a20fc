"""Size and operations of a model, counted from shapes: nothing here is measured.

A linear of [out, in] costs 2 * out * in operations per token (a multiplication and an addition each), less where the
runtime runs two thin products in its place, and what decoding takes in products of its own is counted once for each
pass. Attention costs 4 * heads * width for each token that a token attends to: all of the context in decoding, half of
it on average in a causal prefill. Norms, activations and rotations of positions are left out, as is usual (Kaplan et
al. 2020, "Scaling Laws for Neural Language Models", table 1): under 1 % in models of more than a few million
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import torch

from lilliput.efficiency.serving import Runtime, Serving, servings
from lilliput.efficiency.shapes import Matrix, Shapes, shapes_of
from lilliput.efficiency.zeros import Zeros
from lilliput.errors import PlanError
from lilliput.metrics import size
from lilliput.metrics.metric import Metric
from lilliput.model.stored import Model, served_dtype

_KINDS = {"q": "attention", "k": "attention", "v": "attention", "qkv": "attention", "o": "attention"}
_KINDS |= {"gate": "mlp", "up": "mlp", "gate_up": "mlp", "down": "mlp", "other": "other linears"}


@dataclass(frozen=True)
class Flops:
    """Operations per token at a context length: averaged over a causal prefill of that many tokens (the head at each of
    them), and for one decoded token that attends to that many, itself included."""

    prefill: float
    decode: float

    def to_json(self) -> dict[str, float]:
        return {"prefill": self.prefill, "decode": self.decode}


@dataclass(frozen=True)
class Kind:
    """Stored tensors of one kind."""

    kind: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Counts:
    """Counted figures of a model, and of its base where one was given.

    parameters: all tensors of the language model, tied ones once; bytes: the weight files; ram_bytes: the weights as
    `runtime` holds them; bits_per_weight, model_bits_per_weight: see `lilliput.metrics.size`; compression_ratio: base
    bytes over bytes; macs_saved: multiply-additions per decoded token whose weight is exactly zero, and as a share of
    those of all matrices (None where zeros were not counted; an engine must know of them to save them);
    kv_bytes_per_token: of keys and values at `context` tokens, plain ones in `dtype`; notes: what is not counted.
    """

    parameters: int
    bytes: int
    ram_bytes: int
    bits_per_weight: float
    model_bits_per_weight: float
    context: int
    flops_per_token: Flops
    kv_bytes_per_token: int
    by_kind: tuple[Kind, ...]
    runtime: Runtime
    dtype: torch.dtype
    macs_saved: int | None = None
    macs_saved_share: float | None = None
    base_parameters: int | None = None
    base_bytes: int | None = None
    base_ram_bytes: int | None = None
    base_kv_bytes_per_token: int | None = None
    base_flops_per_token: Flops | None = None
    compression_ratio: float | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data: the report's "size"."""
        out: dict[str, Any] = dict(vars(self))
        for key in ("flops_per_token", "base_flops_per_token"):
            out[key] = None if out[key] is None else out[key].to_json()
        out["by_kind"] = [vars(x) for x in self.by_kind]
        out["dtype"] = str(self.dtype).removeprefix("torch.")
        out["notes"] = list(self.notes)
        return out


def flops(shapes: Shapes, context: int, served: Mapping[str, Serving] | None = None) -> Flops:
    """Operations per token at a context of `context` tokens. Raises PlanError for fewer than one.

    served: how each matrix runs (None: as a dense product); what decoding its weights takes in a pass is shared by the
    tokens of a prefill.
    """
    if context < 1:
        raise PlanError(f"a context of {context} tokens: give 1 token or more")
    prefilling, decoding = (sum(float(x.flops) * _keep(x, served, n) for x in shapes.matrices) for n in (context, 1))
    prefill = sum(x.flops(x.pairs(context)) for x in shapes.attention)
    decode = sum(x.flops(x.span(context)) for x in shapes.attention)
    return Flops(
        float(prefilling + (_forming(shapes, served, context) + prefill) / context),
        float(decoding + _forming(shapes, served, 1) + decode),
    )


def _keep(matrix: Matrix, served: Mapping[str, Serving] | None, tokens: float) -> float:
    return 1.0 if served is None else served[matrix.tensor].at(tokens * float(matrix.active)).keep


def _forming(shapes: Shapes, served: Mapping[str, Serving] | None, tokens: int) -> float:
    """Operations that decoding weights takes in one pass over so many tokens."""
    if served is None:
        return 0.0
    return sum(x.touched(tokens) * served[x.tensor].forming * x.weights for x in shapes.matrices)


def prefill_flops(shapes: Shapes, batch: int, tokens: int, served: Mapping[str, Serving] | None = None) -> float:
    """Operations of a prefill of batch x tokens tokens with logits at the last of each sequence; linears and attention
    only: what decoding weights takes is no work of the model's. served: as in `flops`."""
    tokens_by_tensor = {x.tensor: batch if x.role == "head" else batch * tokens for x in shapes.matrices}
    linears = sum(
        float(x.flops) * _keep(x, served, tokens_by_tensor[x.tensor]) * tokens_by_tensor[x.tensor]
        for x in shapes.matrices
    )
    return float(linears + batch * sum(x.flops(x.pairs(tokens)) for x in shapes.attention))


def count(
    model: Model,
    base: Model | None = None,
    *,
    context: int = 1024,
    runtime: Runtime = "transformers",
    zeros: Mapping[str, Zeros] | None = None,
) -> Counts:
    """Counts of an opened model (and its base). Reads headers, config.json and lilliput.json only.

    context: tokens, for attention; runtime: see `lilliput.efficiency.serving.servings`; zeros: from `count_zeros`,
    which reads the weights. Raises SourceError (a config that does not tell, a damaged lilliput.json) and PlanError
    (context below 1).
    """
    shapes = shapes_of(model)
    dtype = served_dtype(model)
    served = serving_of(model, shapes, runtime)
    measured = size.measure(model)
    saved, share = (None, None) if zeros is None else _saved(shapes, zeros, served)
    theirs = None if base is None else size.measure(base).bytes
    original = None if base is None else shapes_of(base)
    before = None if base is None or original is None else serving_of(base, original, runtime)
    return Counts(
        parameters=_parameters(model),
        bytes=measured.bytes,
        ram_bytes=weight_bytes(model, served, dtype),
        bits_per_weight=measured.bits_per_weight,
        model_bits_per_weight=measured.model_bits_per_weight,
        context=context,
        flops_per_token=flops(shapes, context, served),
        kv_bytes_per_token=_cached(shapes, context, dtype),
        by_kind=_by_kind(model, shapes),
        runtime=runtime,
        dtype=dtype,
        macs_saved=saved,
        macs_saved_share=share,
        base_parameters=None if base is None else _parameters(base),
        base_bytes=theirs,
        base_ram_bytes=None if base is None or before is None else weight_bytes(base, before, served_dtype(base)),
        base_kv_bytes_per_token=None
        if base is None or original is None
        else _cached(original, context, served_dtype(base)),
        base_flops_per_token=None if original is None else flops(original, context, before),
        compression_ratio=None if theirs is None else theirs / measured.bytes,
        notes=shapes.notes,
    )


def weight_bytes(model: Model, served: Mapping[str, Serving], dtype: torch.dtype) -> int:
    """Bytes of all weights in the memory of an engine: matrices as they are served, everything else in `dtype`."""
    total = 0.0
    for name, shape in model.skeleton.shapes.items():
        total += prod(shape) * (served[name].bits / 8 if name in served else dtype.itemsize)
    return round(total)


def serving_of(model: Model, shapes: Shapes, runtime: Runtime = "transformers") -> dict[str, Serving]:
    """How each matrix of a folder runs; see `lilliput.efficiency.serving.servings`."""
    return servings(model, [x.tensor for x in shapes.matrices], served_dtype(model), runtime)


def _cached(shapes: Shapes, context: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values for each of `context` tokens, those of a window as if it were never full."""
    plain = sum(x.cached for x in shapes.attention if x.codec is None) * dtype.itemsize
    coded = sum(x.cache_bytes(context, dtype.itemsize) for x in shapes.attention if x.codec is not None)
    return round(plain + coded / context)


def _parameters(model: Model) -> int:
    return sum(prod(x) for x in model.skeleton.shapes.values())


def _saved(shapes: Shapes, zeros: Mapping[str, Zeros], served: Mapping[str, Serving]) -> tuple[int, float]:
    saved = sum(zeros[x.tensor].count * x.active for x in shapes.matrices if x.tensor in zeros)
    return round(saved), float(
        saved / sum(x.weights * float(x.active) * _keep(x, served, inf) for x in shapes.matrices)
    )


def _by_kind(model: Model, shapes: Shapes) -> tuple[Kind, ...]:
    """Stored bytes by kind, largest first. A tensor that holds several counts once for each, its bytes are split."""
    skeleton, stored = model.skeleton, model.source.stored
    kinds = {x.tensor: "experts" if x.active < 1 else _KINDS.get(x.role, x.role) for x in shapes.matrices}
    kinds |= dict.fromkeys(skeleton.embeddings, "embedding")  # a tied head is the embedding
    totals: dict[str, list[float]] = {}
    for name, ref in model.refs.items():
        whole = stored[ref.stored]
        entry = totals.setdefault(kinds.get(name, "norms and biases"), [0, 0.0])
        entry[0] += 1
        entry[1] += whole.nbytes * prod(skeleton.shapes[name]) / prod(whole.shape)
    for name in model.carried:
        entry = totals.setdefault("carried along", [0, 0.0])
        entry[0] += 1
        entry[1] += stored[name].nbytes
    rows = (Kind(kind, int(n), round(total)) for kind, (n, total) in totals.items())
    return tuple(sorted(rows, key=lambda x: -x.bytes))


METRIC = Metric(
    how="lilliput eval DIR --against MODEL",
    key="size.compression_ratio, size.flops_per_token, size.by_kind",
    unit="1, operations per token, bytes",
    interval="none: counted exactly",
    covers=(
        "compression-ratio",
        "flops",
    ),
)
