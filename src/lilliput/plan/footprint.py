"""What a run occupies, estimated from shapes: an upper bound that is meant to be tight.

Everything counts above a fresh `import lilliput.api`. The terms were fitted to measured peaks; `benchmarks/memory.py`
compares the estimate with the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lilliput.anatomy.model import Block, Linear
from lilliput.errors import PlanError
from lilliput.machine.memory import BASE, MB, SLACK, room
from lilliput.model.weights import TABLE_ROWS
from lilliput.units import readable

_OUTSIDE, _BLOCK, _FIT = "writing what lies outside the blocks", "compressing a block", "fitting a block"
TOKENIZER = "reading the tokenizer"
STILL = 60 * MB  # what the process itself takes, as BASE does, where no forward pass runs


@dataclass(frozen=True)
class Layout:
    """How a run spends its memory: samples per forward pass, and whether all passes pause together at each site."""

    batch: int
    lockstep: bool
    bytes: int
    where: str  # the phase that sets the peak


@dataclass(frozen=True)
class Shape:
    """The numbers that memory depends on."""

    hidden: int
    vocabulary: int
    samples: int
    tokens: int
    itemsize: int  # of the compute dtype
    stored: int  # itemsize of the checkpoint
    outside: int  # bytes that the largest tensor outside the blocks takes while it is written
    packed: int = 0  # bytes of the largest block's output file
    fitting: int = 0  # bytes that a step which trains a block holds for each of its weights
    resident: int = 0  # bytes that stay all the time, such as a rotation
    double: bool = False  # whether a step decomposes weights in float64
    beside: tuple[int, int] = (0, 0)  # further copies of a site's weights and Gram matrix while it is compressed
    scratch: int = 0  # bytes that methods and formats work in whatever the shapes
    fisher: bool = False  # whether squared gradients lie beside the weights while a site is compressed
    phases: tuple[tuple[str, int], ...] = ()  # further phases of the recipe, and what they take


def live_per_token(block: Block, hidden: int) -> int:
    """Elements per token that a suspended forward pass holds at its fullest pause."""
    fullest = 0
    ran: list[Linear] = []
    for site in block.sites:
        names = set(site.linears)
        before = [x for x in ran if x.name.rsplit(".", 1)[0] == site.linears[0].rsplit(".", 1)[0]]
        # An activation function has merged gate and up by the time the down projection runs.
        held = sum(x.out_features for x in before if x.role in {"q", "k", "v", "qkv"})
        # The block's input, what is added to it behind the attention, and that sum normalised.
        fullest = max(fullest, 3 * hidden + site.width + held)
        ran += [x for x in block.linears if x.name in names]
    return fullest


def _site_bytes(block: Block, solving: bool, beside: tuple[int, int]) -> int:
    """The largest site while it is compressed: its weights with the solver's copies, and its Gram matrix likewise."""
    worst = 0
    for site in block.sites:
        weights = 4 * sum(block.linear(name).out_features for name in site.linears) * site.width
        gram = 4 * site.width * site.width
        # A Gram matrix is factored while the weights lie still, and written out when one copy of it is left.
        most = max(2 * weights + 3 * gram, 4 * weights + 2 * gram) if solving else 4 * weights + gram
        worst = max(worst, most + beside[0] * weights + beside[1] * gram)
    return worst


def decomposed(block: Block) -> int:
    """The largest linear while it is decomposed in float64 beside its own weight and Gram matrix (measured)."""
    worst = 0
    for x in block.linears:
        side = min(x.out_features, x.in_features)
        beside = 4 * (x.parameters + x.in_features**2)
        worst = max(worst, beside + 8 * (6 * x.parameters + 5 * side**2) + 12 * x.in_features**2)
    return worst


def fit_bytes(block: Block, shape: Shape, batch: int) -> int:
    """A block while it is trained: its weights in all their copies, and what `batch` samples leave for the way back."""
    parameters = sum(x.parameters for x in block.linears)
    largest = max(x.parameters for x in block.linears)
    wide = sum(x.out_features for x in block.linears) + sum(site.width for site in block.sites)
    token = 4 * 8 * shape.hidden + shape.itemsize * wide
    return parameters * (shape.fitting + 2 * shape.itemsize) + 16 * largest + batch * shape.tokens * token


def estimate(
    blocks: Sequence[Block], shape: Shape, *, batch: int, lockstep: bool, needs: frozenset[str], rewriting: bool
) -> tuple[int, str]:
    """Upper bound of the peak in bytes, and the phase that sets it."""
    kinds = {id(block): block for block in blocks}.values()
    calibrating = bool(needs)
    phases: dict[str, int] = dict(shape.phases)
    phases[_OUTSIDE] = shape.outside
    if calibrating:
        rows = min(shape.vocabulary, shape.samples * shape.tokens)
        phases["embedding"] = (rows * shape.itemsize + TABLE_ROWS * (shape.stored + 4)) * shape.hidden
    per_block = 0
    for block in kinds:
        parameters = sum(x.parameters for x in block.linears)
        widest = max(max(x.out_features, x.in_features) for x in block.linears)
        # A site is solved while no forward pass runs, and the other way round.
        solving = max(_site_bytes(block, "gram" in needs, shape.beside), decomposed(block) if shape.double else 0)
        solving += shape.scratch
        if shape.fisher:
            solving += 2 * 4 * max(sum(block.linear(n).parameters for n in site.linears) for site in block.sites)
        total = shape.packed
        if calibrating:
            total += parameters * shape.itemsize
            if lockstep:
                total += shape.samples * shape.tokens * live_per_token(block, shape.hidden) * shape.itemsize
            if rewriting and "gram" in needs:
                total += sum(4 * site.width**2 for site in block.sites)
            running = batch * shape.tokens * (4 * widest + 6 * shape.hidden) * shape.itemsize
            # The fold of a Gram matrix works in float32.
            running += (
                batch * shape.tokens * widest * 4 + ("gram" in needs) * 4 * max(s.width for s in block.sites) ** 2
            )
            solving = max(solving, running)
        per_block = max(per_block, total + solving)
        if shape.fitting:
            phases[_FIT] = max(phases.get(_FIT, 0), fit_bytes(block, shape, batch))
    phases[_BLOCK] = per_block
    still = {_OUTSIDE, TOKENIZER} if calibrating else {_OUTSIDE, TOKENIZER, _BLOCK}
    whole = {name: size + (STILL if name in still else BASE) for name, size in phases.items()}
    where = max(whole, key=lambda name: whole[name])
    return int((shape.resident + whole[where]) * SLACK), where


def choose(
    blocks: Sequence[Block],
    shape: Shape,
    *,
    budget: int | None,
    needs: frozenset[str],
    rewriting: bool,
    processes: int = 1,
) -> Layout:
    """The fastest layout within the budget, or one of so many processes' part of the free memory where there is none.

    Raises PlanError that names the smallest budget that would do.
    """
    full = max(1, min(shape.samples, 1024 // max(shape.tokens, 1)))
    batches = [full]
    while batches[-1] > 1:
        batches.append(batches[-1] // 2)
    most = room(budget, processes)
    options = [(lockstep, batch) for lockstep in (True, False) for batch in batches]
    smallest: Layout | None = None
    for lockstep, batch in options:
        size, where = estimate(blocks, shape, batch=batch, lockstep=lockstep, needs=needs, rewriting=rewriting)
        layout = Layout(batch, lockstep, size, where)
        if size <= most:
            return layout
        if smallest is None or size < smallest.bytes:
            smallest = layout
    if smallest is None:
        raise PlanError("there is nothing to calibrate on: ask for at least one sample")
    if budget is None:
        return smallest
    raise PlanError(
        f"--memory {readable(budget)} is too small: {smallest.where} alone needs {readable(smallest.bytes)}; "
        f"give --memory {readable(smallest.bytes, up=True)} or more"
    )
