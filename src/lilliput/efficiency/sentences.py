"""One plain sentence for a prediction: what limits the pass, and whether this compression helps."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lilliput.units import size

if TYPE_CHECKING:
    from lilliput.efficiency.devices import Device
    from lilliput.efficiency.prediction import Row, Workload

FASTER = 1.05  # speed-ups between 1 / FASTER and FASTER are called none: predictions are no finer
_DOING = {
    "arithmetic": "bound by arithmetic",
    "memory": "bound by memory",
    "overhead": "bound by Python and launches of operators",
}


def sentence(row: Row, own: Workload, base: Workload | None, device: Device) -> str:
    """In one or two sentences, for someone who must decide whether to ship `own` on `device`."""
    place = f"On {device.title} at batch {row.batch} and {row.context:,} tokens"
    need = own.memory + row.batch * own.shapes.cache_bytes(row.context, own.dtype.itemsize)
    if not row.fits:
        return f"{place} the model does not fit: weights and cache take {size(need)} of {size(device.memory)}."
    if row.speedup is None or base is None or row.base_bound is None:
        rate = row.batch * (row.context if row.phase == "prefill" else 1) / row.seconds
        return f"{place} {row.phase} is {_DOING[row.bound]}: {_rate(rate)} tokens a second at best."
    only = " Only the compressed model fits: the base does not." if row.base_fits is False else ""
    return f"{place} {row.phase} is {_DOING[row.base_bound]}: {_effect(row, own, base, device, row.speedup)}.{only}"


def _effect(row: Row, own: Workload, base: Workload, device: Device, speedup: float) -> str:
    kind, packed, decoded = _kind(own)
    operations = sum(x.flops for x in row.operators) < 0.99 * sum(x.flops for x in row.base_operators)
    if speedup >= FASTER:
        ratio = sum(x.bytes for x in row.base_operators) / sum(x.bytes for x in row.operators)
        if row.base_bound != "arithmetic":
            why = f"moving {ratio:.1f} times fewer bytes" if ratio >= FASTER else "fewer operations"
        else:
            why = "fewer operations" if operations else kind
        return f"{why} can make it up to {speedup:.1f} times as fast"
    if decoded:
        effect = "slower" if speedup <= 1 / FASTER else "no faster"
        return f"the engine decodes the {kind} anew in each pass, which makes it {effect}"
    if packed:
        return f"the engine decodes the {kind} when it loads them and runs dense: the file is smaller, the time is not"
    if kind == "dense":
        return "nothing that takes time differs from the base"
    verb = "will make it slower" if speedup <= 1 / FASTER else "will not make it faster"
    if row.base_bound == "arithmetic":
        return f"{kind} {verb}{_widened(own, device)}"
    if row.base_bound == "overhead":
        extra = sum(x.seconds for x in row.base_operators if x.bound == "overhead")
        return f"{kind} {verb}: {extra / sum(x.seconds for x in row.base_operators):.0%} of the time goes to those"
    largest = max(row.operators, key=lambda x: x.bytes)
    share = largest.bytes / sum(x.bytes for x in row.operators)
    return f"{kind} {verb}: {share:.0%} of the bytes moved go to the {largest.name}"


def _kind(work: Workload) -> tuple[str, bool, bool]:
    """The commonest way that compressed matrices are served, in words; whether they were packed in the file only; and
    whether they are decoded in each pass."""
    weights: Counter[str] = Counter()
    for x in work.shapes.matrices:
        serving = work.served[x.tensor]
        label = f"{int(serving.packed)}-bit weights" if serving.packed is not None else serving.label
        if label != "dense":
            weights[label] += x.weights
    if not weights:
        return "dense", False, False
    held_now = [work.served[x.tensor] for x in work.shapes.matrices]
    return weights.most_common(1)[0][0], any(x.packed is not None for x in held_now), any(x.decoded for x in held_now)


def _widened(work: Workload, device: Device) -> str:
    """That a device lacks the arithmetic which a matrix was quantized for, where it does."""
    lacking = {x.arithmetic for x in work.served.values() if device.arithmetic(x.arithmetic) != x.arithmetic}
    return f", for the device has no {' or '.join(sorted(lacking))} arithmetic" if lacking else ""


def _rate(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 10 else f"{tokens:.1f}"
