"""Predicted time of a model on a device, from config and format alone: no weights are read, nothing is run.

Williams et al. 2009, "Roofline: an insightful visual performance model". Every operator takes the longer of its
arithmetic at the device's peak and its bytes at the device's bandwidth; operators run one after the other:

    seconds = overhead + sum over operators of max(flops / peak, bytes / bandwidth)

Each operand is counted once: weights once a pass, inputs and outputs of each matrix, keys and values written once and
read once (fused attention). Where decoding a weight takes products of its own, as sums with low-rank terms and
rotations do, they are done in float32 once a pass. Named devices have no overhead, and what that leaves out (kernel
launches, caches, Python, imperfect kernels) only adds time: predictions are lower bounds, and speed-ups are what a
perfect engine would show. On this machine the overhead of transformers is measured: where matrices are small, it is
most of a decoding step.

A prefill computes logits at the last token of each sequence only, as generation does. A decoding step adds one token to
each sequence and attends to `context` tokens, itself included. With experts, a pass over t tokens reads each expert
with probability 1 - (1 - k / E)^t: tokens are taken to choose evenly and independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lilliput.efficiency.counts import weight_bytes
from lilliput.efficiency.devices import Device
from lilliput.efficiency.prediction import PHASES, Bound, Operator, Phase, Row, Workload
from lilliput.efficiency.sentences import sentence
from lilliput.efficiency.serving import ARITHMETIC, Serving, servings
from lilliput.efficiency.shapes import shapes_of
from lilliput.errors import PlanError
from lilliput.metrics.metric import Metric
from lilliput.model.stored import Model, served_dtype


def workload(
    model: Model, device: Device, *, dtype: torch.dtype | None = None, what_if: Serving | None = None
) -> Workload:
    """An opened model as the device's runtime serves it. Reads headers and config.json only.

    dtype: of plain tensors; by default the folder's own, but bfloat16 where a float32 folder goes to an engine with
    kernels (vLLM and SGLang serve 16 bits). what_if: how every linear of the blocks would be served instead, routers
    excepted. Raises PlanError for another dtype than a float of 16 or 32 bits.
    """
    shapes = shapes_of(model)
    own = dtype or served_dtype(model)
    if dtype is None and device.runtime == "kernels" and own == torch.float32:
        own = torch.bfloat16
    served = servings(model, [x.tensor for x in shapes.matrices], own, device.runtime)
    if what_if is not None:
        served |= {x.tensor: what_if for x in shapes.matrices if x.compressible}
    return Workload(shapes, served, own, weight_bytes(model, served, own))


def operators(work: Workload, device: Device, phase: Phase, batch: int, context: int) -> tuple[Operator, ...]:
    """What one pass consists of, in the order of a block; equal roles of all blocks are one operator."""
    shapes, item = work.shapes, work.dtype.itemsize
    tokens = batch * context if phase == "prefill" else batch
    rows: dict[str, list[float]] = {}

    def add(name: str, arithmetic: str, flops: float, bytes_moved: float) -> None:
        entry = rows.setdefault(name, [0.0, 0.0, 0.0, 0.0])
        compute = flops / device.peaks[device.arithmetic(arithmetic)]
        transfer = bytes_moved / device.bandwidth
        entry[0] += flops
        entry[1] += bytes_moved
        entry[2] += max(compute, transfer)
        entry[3] += max(compute, transfer) if compute > transfer else 0.0

    plain = ARITHMETIC[work.dtype]
    add("embedding", plain, 0.0, 2.0 * tokens * shapes.hidden * item)
    for (matrix, serving), times in work.groups().items():
        tokens_in = batch if matrix.role == "head" else tokens
        active, serving = float(matrix.active), serving.at(tokens_in * float(matrix.active))
        touched = matrix.touched(tokens_in)
        weights = matrix.weights * touched * (serving.bits / 8 + serving.decoded)
        each = matrix.in_features * serving.inputs + (matrix.out_features + 2 * serving.between) * item
        through = matrix.copies * active * tokens_in * each
        add(
            matrix.role,
            serving.arithmetic,
            times * float(matrix.flops) * serving.keep * tokens_in,
            times * (weights + through),
        )
        if serving.forming:  # after reading what is stored, and before the product
            add(matrix.role, "fp32", times * matrix.weights * touched * serving.forming, 0.0)
    for x in shapes.attention:
        pairs = x.pairs(context) if phase == "prefill" else x.span(context)
        queries = tokens * x.heads * (x.key_width + x.value_width) * item
        add("attention", plain, float(batch * x.flops(pairs)), float(queries))
        held = batch * x.cache_bytes(context, item)
        written = tokens * x.cached * item if x.codec is None else held * tokens / (batch * context)
        # A compressed cache is decoded for every call: all of it is written once more, and read.
        decoded = 0 if x.codec is None else 2 * batch * x.span(context) * x.cached * item
        add("kv cache", plain, 0.0, float(written + held + decoded))
    # A norm reads and writes; two additions to the residual stream read twice and write; so does a gated activation.
    elements = 2 * sum(shapes.norms) + 6 * shapes.hidden * shapes.blocks + 3 * float(shapes.inner)
    add("norms and activations", plain, elements * tokens, elements * tokens * item)
    listed = tuple(
        Operator(name, flops, bytes_moved, seconds, "arithmetic" if computing > seconds / 2 else "memory")
        for name, (flops, bytes_moved, seconds, computing) in rows.items()
    )
    once, each = device.overhead
    overhead = once + shapes.blocks * each
    return (*listed, Operator("python and launches", 0.0, 0.0, overhead, "overhead")) if overhead else listed


def product_seconds(device: Device, rows: int, width: int, tokens: int, dtype: torch.dtype) -> float:
    """Seconds of one product [tokens, width] x [width, rows] of plain weights in `dtype`, as `operators` counts it."""
    compute = 2.0 * rows * width * tokens / device.peaks[device.arithmetic(ARITHMETIC[dtype])]
    moved = (rows * width + tokens * (rows + width)) * dtype.itemsize
    return max(compute, moved / device.bandwidth)


def bound_of(rows: Sequence[Operator]) -> Bound:
    """What most of the time goes to."""
    spent: dict[Bound, float] = {"memory": 0.0, "arithmetic": 0.0, "overhead": 0.0}
    for x in rows:
        spent[x.bound] += x.seconds
    return max(spent, key=spent.__getitem__)


def rooflines(
    model: Model,
    base: Model | None,
    devices: Sequence[Device],
    *,
    batches: Sequence[int] = (1, 16),
    contexts: Sequence[int] = (512, 4096),
    dtype: torch.dtype | None = None,
    what_if: Serving | None = None,
) -> tuple[Row, ...]:
    """A row for each device, batch, context and phase; contexts beyond a model's positions are left out.

    dtype, what_if: see `workload`; `what_if` changes the compressed model only. Raises PlanError where a batch or
    context is below 1, or no context is left.
    """
    if any(x < 1 for x in (*batches, *contexts)):
        raise PlanError("batches and contexts of a roofline are 1 or more")
    rows: list[Row] = []
    for device in devices:
        own = workload(model, device, dtype=dtype, what_if=what_if)
        theirs = None if base is None else workload(base, device, dtype=dtype)
        longest = min(x.shapes.positions or max(contexts) for x in (own, theirs) if x is not None)
        fitting = [x for x in contexts if x <= longest]
        if not fitting:
            raise PlanError(
                f"the model has {longest} positions, and every context asked for is longer: give shorter ones"
            )
        rows += [
            _row(own, theirs, device, phase, batch, context)
            for batch in batches
            for context in fitting
            for phase in PHASES
        ]
    return tuple(rows)


def _row(own: Workload, base: Workload | None, device: Device, phase: Phase, batch: int, context: int) -> Row:
    listed = operators(own, device, phase, batch, context)
    theirs = () if base is None else operators(base, device, phase, batch, context)
    seconds = sum(x.seconds for x in listed)
    before = None if base is None else sum(x.seconds for x in theirs)
    row = Row(
        device=device.name,
        batch=batch,
        context=context,
        phase=phase,
        seconds=seconds,
        bound=bound_of(listed),
        fits=_fits(own, device, batch, context),
        operators=listed,
        sentence="",
        base_seconds=before,
        base_bound=None if base is None else bound_of(theirs),
        base_fits=None if base is None else _fits(base, device, batch, context),
        base_operators=theirs,
        speedup=None if before is None else before / seconds,
    )
    return replace(row, sentence=sentence(row, own, base, device))


def _fits(work: Workload, device: Device, batch: int, context: int) -> bool:
    return work.memory + batch * work.shapes.cache_bytes(context, work.dtype.itemsize) <= device.memory


METRIC = Metric(
    how="lilliput eval DIR --against MODEL --roofline",
    key="roofline.rows",
    unit="seconds, 1",
    interval="none: predicted, a bound",
    covers=("roofline",),
    paper="Williams et al. 2009, doi:10.1145/1498765.1498785",
)
