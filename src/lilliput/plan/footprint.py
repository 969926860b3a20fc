"""What a run occupies, estimated from shapes: an upper bound that is meant to be tight.

Everything counts above a fresh `import lilliput.api`. The terms were fitted to measured peaks; `benchmarks/memory.py`
compares the estimate with the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lilliput.errors import PlanError
from lilliput.machine.cost import Phase
from lilliput.machine.memory import BASE, MB, SLACK, room
from lilliput.plan.resolve import LinearPlan, Resolved
from lilliput.streaming import peak
from lilliput.streaming.peak import Run
from lilliput.units import readable
from lilliput.verbs.spec import Stage

OUTSIDE, _BLOCK = "writing what lies outside the blocks", "compressing a block"
TOKENIZER = "reading the tokenizer"
STILL = 60 * MB  # what the process itself takes, as BASE does, where no forward pass runs


@dataclass(frozen=True)
class Batching:
    """How a run spends its memory: samples per forward pass, and whether all passes pause together at each site."""

    batch: int
    lockstep: bool
    bytes: int
    where: str  # the phase that sets the peak


def estimate(resolved: Resolved, run: Run, phases: Sequence[Phase], *, lockstep: bool, packed: int) -> tuple[int, str]:
    """Upper bound of the peak in bytes, and the phase that sets it.

    `phases`: what the run does beside its steps; `packed`: bytes of the largest block's output.
    """
    most: dict[str, int] = {}
    calibrating = resolved.flows
    for phase in (*phases, *(x for task in resolved.tasks for x in task.phases(run))):
        most[phase.name] = max(most.get(phase.name, 0), phase.cost.ram)
    if calibrating:
        most["embedding"] = peak.of_embedding(run).ram
    most[_BLOCK] = max(_block(resolved, run, n, lockstep) for n in resolved.kinds(run.blocks)) + packed
    still = {OUTSIDE, TOKENIZER} if calibrating else {OUTSIDE, TOKENIZER, _BLOCK}
    whole = {name: size + (STILL if name in still else BASE) for name, size in most.items()}
    where = max(whole, key=lambda name: whole[name])
    resident = peak.of_rotation(run).ram if any(task.spec.turns for task in resolved.tasks) else 0
    resident += sum(task.resident() for task in resolved.tasks)
    return int((resident + whole[where]) * SLACK), where


def _block(resolved: Resolved, run: Run, number: int, lockstep: bool) -> int:
    """A block while the walk is at it: rewritten first, and then compressed site after site."""
    block, gram = run.blocks[number], "gram" in resolved.needs
    plans = resolved.of_block(number)
    solving = max((_site(run, [x for x in plans if x.linear.name in site.linears]) for site in block.sites), default=0)
    for task in resolved.at(Stage.TARGETS):
        solving = max(solving, task.cost(run, block.linears).ram)
    rewrites = resolved.at(Stage.BLOCK)
    rewriting = max((task.cost(run, block.linears).ram for task in rewrites), default=0)
    if not resolved.flows:
        return max(rewriting, solving)
    # No forward pass runs while something is solved, and the other way round.
    solving = max(solving, peak.of_forward(run, block, gram=gram).ram)
    finished = (*resolved.at(Stage.RUNNING), *resolved.at(Stage.CACHE))
    solving = max([solving, *(task.cost(run, block.linears).ram for task in finished)])
    most = peak.of_resident(run, block, grams=False, lockstep=lockstep).ram + solving
    if not rewrites:
        return most
    grams = any("gram" in task.needs for task in rewrites)
    rewriting = max(rewriting, peak.of_forward(run, block, gram=False).ram)
    return max(most, peak.of_resident(run, block, grams=grams, lockstep=False).ram + rewriting)


def _site(run: Run, plans: Sequence[LinearPlan]) -> int:
    """The linears of a site, stacked, while their steps are carried out one after the other."""
    linears = [x.linear for x in plans]
    rows, width = sum(x.out_features for x in linears), linears[0].in_features
    steps = {task.step: task for x in plans for task in x.alone}
    solving = max([peak.of_solving(linears, gram=False).ram, *(x.cost(run, linears).ram for x in steps.values())])
    schemes = dict.fromkeys(x.scheme for x in plans if x.tasks)
    return solving + max((scheme.cost(rows, width).ram for scheme in schemes), default=0)


def choose(
    resolved: Resolved, run: Run, phases: Sequence[Phase], *, packed: int, budget: int | None, processes: int = 1
) -> Batching:
    """The fastest batching within the budget, or one of so many processes' part of the free memory where there is none.

    Raises PlanError that names the smallest budget that would do.
    """
    full = max(1, min(run.samples, 1024 // max(run.tokens, 1)))
    batches = [full]
    while batches[-1] > 1:
        batches.append(batches[-1] // 2)
    most = room(budget, processes)
    smallest: Batching | None = None
    for lockstep in (True, False):
        for batch in batches:
            size, where = estimate(resolved, replace(run, batch=batch), phases, lockstep=lockstep, packed=packed)
            batching = Batching(batch, lockstep, size, where)
            if size <= most:
                return batching
            if smallest is None or size < smallest.bytes:
                smallest = batching
    if smallest is None:
        raise PlanError("there is nothing to calibrate on: ask for at least one sample")
    if budget is None:
        return smallest
    raise PlanError(
        f"--memory {readable(budget)} is too small: {smallest.where} alone needs {readable(smallest.bytes)}; "
        f"give --memory {readable(smallest.bytes, up=True)} or more"
    )
