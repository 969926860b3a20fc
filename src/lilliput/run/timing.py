"""Times of linears at other widths: predicted by a device's roofline, or measured as medians of repeated products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from lilliput.anatomy.model import Block
from lilliput.efficiency.devices import THIS, Device, device, devices, synchronize
from lilliput.efficiency.roofline import product_seconds
from lilliput.errors import LilliputError, PlanError, nearest
from lilliput.model.edit import heads_of
from lilliput.model.stored import served_dtype
from lilliput.model.weights import Model
from lilliput.verbs.timing import MEASURE, BlockTimes, Timing

REPEATS = 9  # runs of a shape whose median counts, after one that does not

Shapes = Sequence[tuple[int, int]]
"""[out, in] of linears."""
Clock = Callable[[], float]


def refuse(timing: Timing) -> None:
    """Raises PlanError for a device that nobody knows."""
    known = [x.name for x in devices()] + [THIS, MEASURE]
    if timing.device not in known:
        raise PlanError(
            f"times on the device '{timing.device}': one of {', '.join(known)}.{nearest(timing.device, known)}"
        )


def table(model: Model, timing: Timing, clock: Clock = time.perf_counter) -> list[BlockTimes]:
    """The times of every block of the model, alike for alike blocks. Raises PlanError for an unknown device."""
    refuse(timing)
    dtype = served_dtype(model)
    if timing.device == MEASURE:
        where = str(model.skeleton.device)

        def seconds(shapes: Shapes) -> float:
            return measured(shapes, timing.tokens, dtype, where, clock)

    else:
        named = device(timing.device)

        def seconds(shapes: Shapes) -> float:
            return predicted(shapes, timing.tokens, dtype, named)

    found: dict[int, BlockTimes] = {}
    for block in model.anatomy().blocks:
        if id(block) not in found:
            found[id(block)] = _of_block(block, timing, seconds)
    return [found[id(block)] for block in model.anatomy().blocks]


def predicted(shapes: Shapes, tokens: int, dtype: torch.dtype, where: Device) -> float:
    """Seconds of products [tokens, in] x [in, out], one after the other, by the device's roofline; a float32 model is
    served in bfloat16 there, as in `roofline.workload`."""
    if where.runtime == "kernels" and dtype == torch.float32:
        dtype = torch.bfloat16
    return sum(product_seconds(where, rows, width, tokens, dtype) for rows, width in shapes)


def measured(shapes: Shapes, tokens: int, dtype: torch.dtype, where: str, clock: Clock) -> float:
    """Seconds of the same products on a torch device with its present threads: the median of `REPEATS` runs."""
    pairs = []
    for rows, width in shapes:
        sizes = (tokens, width), (rows, width)
        pairs.append([torch.full(size, 0.01, dtype=dtype, device=where) for size in sizes])
    taken = []
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            synchronize(where)
            began = clock()
            for x, weight in pairs:
                torch.nn.functional.linear(x, weight)
            synchronize(where)
            taken.append(clock() - began)
    return statistics.median(taken[1:])


def _of_block(block: Block, timing: Timing, seconds: Callable[[Shapes], float]) -> BlockTimes:
    rest = {x.name for x in block.linears}
    times: dict[str, dict[int, int]] = {}

    def add(key: str, counts: Sequence[int], rows: dict[str, int], columns: dict[str, int]) -> None:
        """rows, columns: by linear those of one unit; counts: of units, the present one last."""
        linears = [block.linear(name) for name in (rows | columns)]
        rest.difference_update(x.name for x in linears)
        times[key] = {}
        for count in counts:
            gone = counts[-1] - count
            shapes = [
                (x.out_features - gone * rows.get(x.name, 0), x.in_features - gone * columns.get(x.name, 0))
                for x in linears
            ]
            times[key][count] = _nanoseconds(seconds(shapes), key)

    heads = heads_of(block)
    if heads:
        sides: dict[str, dict[str, int]] = {"rows": {}, "columns": {}}
        for name, side, (a, b) in heads[0].members:
            sides[side][name] = sides[side].get(name, 0) + b - a
        add("heads", range(1, len(heads) + 1), sides["rows"], sides["columns"])
    for m, mlp in enumerate(block.groups.channels):
        producers: dict[str, int] = {}
        for name, _ in mlp.rows:
            producers[name] = producers.get(name, 0) + 1
        add(f"channels.{m}", widths(mlp.width, timing), producers, dict.fromkeys(mlp.readers, 1))
    others = [(x.out_features, x.in_features) for x in block.linears if x.name in rest]
    times["rest"] = {0: _nanoseconds(seconds(others), "rest") if others else 0}
    return times


def widths(width: int, timing: Timing) -> list[int]:
    """Evenly spaced multiples up to an MLP's present width, which is the last whether it is one or not."""
    steps = width // timing.multiple
    places = {max(1, round(steps * n / timing.points)) for n in range(1, timing.points)} if steps else set()
    return [*(timing.multiple * n for n in sorted(places) if timing.multiple * n < width), width]


def _nanoseconds(seconds: float, key: str) -> int:
    if seconds <= 0.0:
        raise LilliputError(f"the clock did not advance while {key} were timed: name a device in place of measuring")
    return max(1, round(1e9 * seconds))
