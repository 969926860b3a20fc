"""What a run takes beside its steps: the phases that fill memory, and the time, from one short measured product."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import torch

from lilliput.algebra import compiled
from lilliput.errors import PlanError
from lilliput.export.engine import least
from lilliput.machine import memory
from lilliput.machine.cost import Cost, Phase
from lilliput.model import rotated
from lilliput.model.weights import TABLE_ROWS, Model
from lilliput.plan import caching, footprint, training_cost
from lilliput.plan.resolve import LinearPlan, Resolved
from lilliput.plan.tensors import LARGE, TensorPlan, at_a_time
from lilliput.streaming.peak import Run
from lilliput.verbs.spec import Stage

TOKENIZER = 21  # bytes in memory for one of the tokenizer's files
WHOLE = "tokenizer.json"  # where it is there, nothing else is read
TOKENS = {".json", ".model", ".tiktoken", ".txt"}


@functools.cache
def _rates(dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of matrix products in `dtype` and in float32; measured once a process."""
    side = 1024
    a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    f = torch.randn(side, side)
    for x, y in ((a, b), (f, f)):
        x @ y
    start = time.perf_counter()
    for _ in range(4):
        a @ b
    middle = time.perf_counter()
    for _ in range(2):
        f @ f
    rate = 4 * 2 * side**3 / max(middle - start, 1e-9)
    slow = 2 * 2 * side**3 / max(time.perf_counter() - middle, 1e-9)
    return rate, slow


def seconds(resolved: Resolved, run: Run, dtype: torch.dtype, measured: bool) -> float:
    """Time from a short measured product and the work that the shapes imply; a guide, not a promise."""
    rate, slow = _rates(dtype)
    count, weights = run.samples * run.tokens, run.weights
    seconds = 3.0  # opening
    if resolved.needs or resolved.flows:
        own = sum(task.spec.observes(tuple(resolved.governed(task).values())) for task in resolved.tasks)
        passes = 1 + bool(resolved.at(Stage.BLOCK)) + own
        seconds += passes * 3.0 * 2 * weights * count / rate
    sloped = resolved.fisher(run.samples) + caching.weighed(resolved, run.samples)
    seconds += 4 * 2 * weights * sloped * run.tokens / rate  # two passes forward, one back
    covered = [(task, resolved.covered(task)) for task in resolved.tasks]
    seconds += sum(2 * task.cost(run, linears).operations for task, linears in covered if linears) / rate
    if "gram" in resolved.needs:
        sites = {(x.block, x.linear.site): x.linear.in_features for x in resolved.linears if x.tasks}
        seconds += sum(2 * width**2 * count for width in sites.values()) / (1.5 * slow)
        seconds += sum(6 * x.linear.parameters * x.linear.in_features for x in resolved.linears if x.tasks) / slow
    # A table's Gram matrix is factored anew for each slab.
    slabs = [
        (x.linear.parameters, x.linear.in_features, -(-x.linear.out_features // TABLE_ROWS)) for x in resolved.tables
    ]
    seconds += sum(own * 6 * width + cuts * 2 * width**3 for own, width, cuts in slabs) / slow
    seconds += sum(_walks(x) for x in resolved.planned)
    # The closing evaluation: 8 windows of 1,024 tokens through both models in float32.
    seconds += measured * 2 * 2 * 1.5 * weights * 8 * 1024 / slow
    return seconds + weights / 25e6


def _walks(x: LinearPlan) -> float:
    """Seconds that formats take beyond matrix products, in the sweep and in each pass after it."""
    rows, width = x.linear.out_features, x.linear.in_features
    work = x.scheme.cost(rows, width).operations
    passes = max((task.spec.rounds(task.options) for task in x.tasks), default=1)
    each = 2.5e-10 if compiled.available() else 1e-8  # measured on one core
    return work * passes * each / torch.get_num_threads()


def phases(
    model: Model, resolved: Resolved, run: Run, tensors: Sequence[TensorPlan], teacher: Model | None = None
) -> tuple[Phase, ...]:
    """What every run does beside its steps: writing what lies outside the blocks, reading the tokenizer, and a teacher
    that stands beside the student."""
    outside = max((at_a_time(x) for x in tensors if x.kind in LARGE), default=0)
    listed = [(footprint.OUTSIDE, outside), (footprint.TOKENIZER, _tokenizer(model))]
    if any(task.spec.turns for task in resolved.tasks):
        listed.append(("writing the turned head", outside + 2 * 4 * rotated.ROWS * run.hidden))
    if resolved.tables:
        listed.append(("compressing the embedding and the head", _tables(resolved)))
    return (*(Phase(name, Cost(ram=ram)) for name, ram in listed), *training_cost.phases(resolved, run, model, teacher))


def closing(model: Model, budget: int | None, processes: int, measured: bool) -> tuple[Phase, ...]:
    """What follows the blocks: comparing those of the result with the engine's, where there is room for it (it is left
    out elsewhere), and the evaluation, where there is one."""
    needed = Cost(ram=least(model.anatomy().blocks))
    fits = int((memory.BASE + needed.ram) * memory.SLACK) <= memory.room(budget, processes)
    comparing = (Phase("opening the result in its engine", needed),) if fits else ()
    return (*comparing, *((Phase("measuring the result", Cost(ram=_evaluation(model, budget))),) if measured else ()))


def _tables(resolved: Resolved) -> int:
    """A slab of rows of the embedding or the head with the solver's copies, the Gram matrix with its factors, and how
    often each token occurs."""
    most = 0
    for x in resolved.tables:
        rows, width = min(TABLE_ROWS, x.linear.out_features), x.linear.in_features
        solving = any("gram" in task.needs for task in x.tasks)
        most = max(most, 4 * (6 * rows * width + (4 * width * width if solving else 0) + 2 * x.linear.out_features))
    return most


def _evaluation(model: Model, budget: int | None) -> int:
    """What the closing evaluation takes beside `memory.BASE`: 8 windows of the result and the original, in float32.

    The least that it can do with where it does not fit the budget.
    """
    from lilliput.metrics.slices import choose, window
    from lilliput.metrics.slices import least as fewest

    tokens = window(model)
    try:
        return choose([model, model], tokens, budget, 8, torch.float32.itemsize).bytes
    except PlanError:
        return fewest([model, model], tokens, 8 * tokens, torch.float32.itemsize)


def _tokenizer(model: Model) -> int:
    """What the tokenizer takes while it is read: its file as text, as plain data, and the library's tables (measured
    from 49,152 to 262,144 tokens)."""
    files = model.source.side_files()
    chosen = [files[WHOLE]] if WHOLE in files else [x for x in files.values() if x.suffix in TOKENS]
    return TOKENIZER * sum(x.stat().st_size for x in chosen)
