"""What a run will take, from shapes and one short measured product: its time, and the phases that fill memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import torch

from lilliput.algebra import compiled
from lilliput.errors import PlanError
from lilliput.machine import memory
from lilliput.model import rotated
from lilliput.model.weights import TABLE_ROWS, Model
from lilliput.parts.quantized import QuantizedSpec
from lilliput.plan import footprint
from lilliput.plan.resolve import LinearPlan, Resolved
from lilliput.plan.tensors import LARGE, TensorPlan, at_a_time
from lilliput.streaming import peak
from lilliput.verbs.spec import Extent, Stage

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


def seconds(model: Model, resolved: Resolved, samples: int, tokens: int, dtype: torch.dtype, measured: bool) -> float:
    """Time from a short measured product and the work that the shapes imply; a guide, not a promise."""
    rate, slow = _rates(dtype)
    count = samples * tokens
    weights = sum(x.linear.parameters for x in resolved.linears)
    seconds = 3.0  # opening
    if resolved.needs:
        own = sum(task.spec.observes(tuple(resolved.governed(task).values())) for task in resolved.tasks)
        passes = 1 + bool(resolved.at(Stage.BLOCK)) + own
        seconds += passes * 3.0 * 2 * weights * count / rate
    seconds += 4 * 2 * weights * resolved.fisher(samples) * tokens / rate  # two passes forward, one back
    for task in resolved.tasks:
        extent = Extent(weights, len(resolved.governed(task)), samples, tokens)
        seconds += 2 * task.cost(extent).operations / rate
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
    """Seconds that formats take beyond matrix products, in the sweep and in each pass behind it."""
    rows, width = x.linear.out_features, x.linear.in_features
    work = sum(part.format.cost(rows, width).operations for part in x.scheme.parts if isinstance(part, QuantizedSpec))
    passes = max((task.spec.rounds(task.options) for task in x.tasks), default=1)
    each = 2.5e-10 if compiled.available() else 1e-8  # measured on one core
    return work * passes * each / torch.get_num_threads()


def phases(
    model: Model, resolved: Resolved, tensors: Sequence[TensorPlan], tokens: int, dtype: torch.dtype
) -> tuple[tuple[str, int], ...]:
    """What turning the model, gradients of its loss and losses under trial take at their fullest, where a recipe asks
    for them."""
    width, vocabulary = model.skeleton.hidden_size, model.skeleton.shapes[model.skeleton.head][0]
    slopes: tuple[tuple[str, int], ...] = ()
    if any(task.spec.tokens(task.options) for task in resolved.at(Stage.TARGETS)):
        blocks = model.anatomy().blocks
        beside = max(footprint.decomposed(block) for block in blocks)
        stored = max(x.dtype.itemsize for x in tensors)
        held = peak.of_loss(blocks, width, vocabulary, tokens, dtype.itemsize, stored, beside).ram
        slopes = (("trying out candidates", held),)
    if resolved.fisher(1):
        held = peak.of_gradients(model.anatomy().blocks, width, vocabulary, tokens, dtype.itemsize, outside=False).ram
        slopes = (*slopes, ("the backward pass for squared gradients", held))
    turns = [task for task in resolved.tasks if task.spec.turns]
    if not turns:
        return slopes
    turning = rotated.resident(width) * 5
    written = max(at_a_time(x) for x in tensors if x.kind in LARGE)
    phases = [("turning the model", turning), ("writing the turned head", written + 2 * 4 * rotated.ROWS * width)]
    if any(task.spec.tokens(task.options) for task in turns):
        held = peak.of_gradients(model.anatomy().blocks, width, vocabulary, tokens, dtype.itemsize).ram
        phases.append(("learning a rotation", turning + held))
    return (*phases, *slopes)


def tables(resolved: Resolved) -> tuple[tuple[str, int], ...]:
    """Compressing the embedding and the head, a slab of rows at a time: its weights with the solver's copies, the Gram
    matrix with its factors, and how often each token occurs."""
    most = 0
    for x in resolved.tables:
        rows, width = min(TABLE_ROWS, x.linear.out_features), x.linear.in_features
        solving = any("gram" in task.needs for task in x.tasks)
        most = max(most, 4 * (6 * rows * width + (4 * width * width if solving else 0) + 2 * x.linear.out_features))
    return (("compressing the embedding and the head", most),) if most else ()


def beside(resolved: Resolved) -> tuple[int, int]:
    """Copies of a site's weights and Gram matrix beside those of a solver (measured): what is turned lies beside what
    it was made from, and of several parts each is taken from what the others leave over."""
    weights = grams = 0
    for scheme in (x.scheme for x in resolved.linears if x.tasks):
        if scheme.inputs or scheme.outputs:
            weights, grams = max(weights, 2), max(grams, 5)
        elif len(scheme.parts) > 1:
            weights, grams = max(weights, 2), max(grams, 1)
    return weights, grams


def scratch(resolved: Resolved) -> int:
    """Bytes in which methods and formats work beside copies of weights and Gram matrices."""
    methods = max((task.cost(Extent(x.linear.parameters)).ram for x in resolved.linears for task in x.alone), default=0)
    formats = {
        (part.format, x.linear.out_features, x.linear.in_features)
        for x in resolved.linears
        for part in x.scheme.parts
        if isinstance(part, QuantizedSpec)
    }
    return methods + max((form.cost(rows, width).ram for form, rows, width in formats), default=0)


def trained(resolved: Resolved) -> int:
    """Bytes that steps which close a block hold for each of its weights."""
    return max((task.cost(Extent(1)).ram for x in resolved.linears for task in x.together), default=0)


def measuring(model: Model, budget: int | None) -> int:
    """What the closing evaluation takes beside `memory.BASE`: 8 windows of the result and the original, in float32.

    The least that it can do with where it does not fit the budget.
    """
    from lilliput.metrics.layout import choose, least, window

    tokens = window(model)
    try:
        return choose([model, model], tokens, budget, 8, torch.float32.itemsize).bytes
    except PlanError:
        return least([model, model], tokens, 8 * tokens, torch.float32.itemsize)


def comparing(model: Model, budget: int | None, processes: int) -> tuple[tuple[str, int], ...]:
    """Comparing blocks of the result with those of its engine, where there is room for it; it is left out elsewhere."""
    from lilliput.export.engine import least

    needed = least(model.anatomy().blocks)
    fits = int((memory.BASE + needed) * memory.SLACK) <= memory.room(budget, processes)
    return (("opening the result in its engine", needed),) if fits else ()


def reading_tokenizer(model: Model) -> int:
    """What the tokenizer takes while it is read: its file as text, as plain data, and the library's tables (measured
    from 49,152 to 262,144 tokens)."""
    files = model.source.side_files()
    chosen = [files[WHOLE]] if WHOLE in files else [x for x in files.values() if x.suffix in TOKENS]
    return TOKENIZER * sum(x.stat().st_size for x in chosen)
