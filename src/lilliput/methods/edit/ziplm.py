"""ZipLM: hidden channels and heads leave one after the other, each time whichever the others can best make up for.

With H = XT X of the inputs of a linear W that reads the units, and the columns S of one of them, losing it costs

    tr(W_S ([H^-1]_SS)^-1 W_ST)

when the columns that stay are changed as they should be. The cheapest unit leaves, H^-1 and W are brought up to date,
and the costs are taken anew, until none is left. A unit's score is the error of all that have left with it, as a share
of the linear's output: the order of removal, and for every width the error that it costs.

Paper: Kurtic et al. 2023, arXiv 2302.04089. Its update of the columns that stay is what `refit` after this step solves.
The paper chooses a width for each block, from such errors and a table of measured times, by dynamic programming:
`widths` does that. With `uniform: false` the step does so with weights in place of times; with `speedup` s as well it
takes times, and with t_b(k) what the linears of part b (an MLP, the attention's) take with k units of theirs, the
sum of t_b(k_b) over all parts and of what cannot change is at most 1 / s of what it is now. Times are those of `timed`:
medians of repeated products on this machine, or a device's roofline. They are a record of the journal.

Cost: one forward pass, and about 5 in^3 for each linear that reads units; a table of times some seconds for each kind
of block. Limits: dense inputs are seen, not those after earlier blocks have lost something; errors are of single
linears; times are of the linears of blocks, without attention itself, norms, embedding, head and launches between
them; those of small matrices are of matrices in the caches. With `speedup` the plan only guesses the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field

from lilliput.algebra.removal import removal
from lilliput.budget.choice import Item, Option, choose
from lilliput.errors import PlanError
from lilliput.model.edited import Edit as Decision
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import (
    EditIO,
    EditScores,
    EditView,
    Sizes,
    Thinning,
    Units,
    best_units,
    highest,
    readers_of,
    thinned,
)
from lilliput.verbs.timing import MEASURE, Times, Timing

_STEPS = 8192  # of the table in which times are added up


class Options(Thinning):
    """See the module's docstring."""

    damping: float = Field(0.01, gt=0.0, description="added to the diagonal of H, as a share of its mean")
    speedup: float | None = Field(
        None, gt=1.0, description="by how much the linears of the blocks get faster, in place of ratio"
    )
    timed: str = Field(
        MEASURE, description="with speedup: whose times count, a device as `lilliput roofline` knows it or measure"
    )
    timed_tokens: int = Field(1, ge=1, description="tokens of a timed pass: 1 as in decoding, many as in a prompt")
    points: int = Field(32, ge=1, description="widths of an MLP that are timed and may be chosen, at most")


def sizes(units: Sequence[Units], o: Options) -> Sizes:
    """What stays; with a speed-up a guess before anything is timed. Raises PlanError for what cannot be."""
    if o.speedup is None:
        return thinned(units, o)
    if o.uniform:
        raise PlanError("ziplm with a speedup gives each block widths of its own: set uniform to false")
    try:
        return thinned(units, o.model_copy(update={"ratio": 1.0 - 1.0 / o.speedup}))
    except PlanError as error:
        raise PlanError(f"ziplm: a speedup of {o.speedup} (taken for a ratio until it is timed): {error}") from error


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """For each unit the share of the output that is lost once it has left, and all that left before it."""
    scores: dict[str, tuple[float, ...]] = {}
    for key, owners in readers_of(view.anatomy).items():
        if key.partition(".")[0] not in {f"{kind}s" for kind in o.kinds}:
            continue
        # Linears that read the same units have the same inputs: their rows are one matrix.
        name, owner = next(iter(owners.items()))
        weight = torch.cat([view.weight(n) for n in owners])
        gram = io.stats[view.anatomy.linear(name).site].need("gram")
        columns = torch.sort(owner, stable=True).indices[int((owner < 0).sum()) :]
        groups = columns.reshape(int(owner.max()) + 1, -1)
        order, errors = removal(weight, gram, groups, o.damping)
        values = torch.empty(len(order), dtype=torch.float64)
        values[order] = errors
        scores[key] = tuple(values.tolist())
    return scores


def widths(
    errors: Sequence[Mapping[int, float]], times: Sequence[Mapping[int, int]], limit: int
) -> tuple[tuple[int, ...], float]:
    """The width of each part (a block's MLP, a block's heads) whose errors add up to least while the times of all stay
    within `limit`, and that error.

    errors, times: for each part by width; times are whole numbers of any unit (nanoseconds, weights). Raises PlanError
    where even the quickest widths take longer.
    """
    items = tuple(
        Item(str(n), tuple(Option(width, times[n][width], error) for width, error in sorted(part.items())))
        for n, part in enumerate(errors)
    )
    found = choose(items, limit)
    if found is None:
        least = sum(min(part.values()) for part in times)
        raise PlanError(f"ziplm: no widths take {limit} or less, the quickest take {least}: allow more time")
    picked = (item.options[pick].key for item, pick in zip(items, found.picks, strict=True))
    return tuple(picked), found.loss


def allowed(times: Times, parts: Sequence[tuple[int, str]], speedup: float) -> int:
    """Nanoseconds that these parts, by block and key, may take together. Raises PlanError where there are none."""
    whole = sum(max(x.items())[1] for block in times for x in block.values())
    left = int(whole / speedup) - whole + sum(max(times[n][key].items())[1] for n, key in parts)
    if left <= 0:
        raise PlanError(
            f"ziplm: the linears that keep their sizes take more than 1 / {speedup} of the time: ask for less, or for "
            "kinds [channel, head]"
        )
    return left


def divided(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, speedup: float = 1.0) -> Decision:
    """Blocks of their own widths that keep no more weights than blocks of `sizes` alike, or with `sizes.times` take no
    more than 1 / speedup of their time, at the least sum of errors.

    At least one head stays in each, and hidden channels in multiples of `sizes.multiple` (or all). Raises PlanError
    where that is more than `sizes` leaves, LilliputError for NaN.
    """
    errors: list[Mapping[int, float]] = []
    weights: list[Mapping[int, int]] = []
    parts: list[tuple[int, str]] = []
    limit = 0
    for n, x in enumerate(units):
        for key in scores[n]:
            head = key == "heads"
            count, cost = (sizes.heads, x.head_cost) if head else (sizes.channels, x.channel_cost)
            if count is None:
                continue
            timed = None if sizes.times is None else sizes.times[n][key]
            step = 1 if head else sizes.multiple
            highest(scores[n][key], count)  # refuses NaN, among which no least sum is found
            whole = len(scores[n][key])
            errors.append({w: e for w, e in by_width(scores[n][key]).items() if w and (w % step == 0 or w == whole)})
            if timed is not None:
                errors[-1] = {w: e for w, e in errors[-1].items() if w in timed}
            weights.append({w: w * cost if timed is None else timed[w] for w in errors[-1]})
            parts.append((n, key))
            limit += count * cost
    if sizes.times is not None:
        limit = allowed(sizes.times, parts, speedup)
        least = sum(min(x.values()) for x in weights)
        if least > limit:
            raise PlanError(
                f"ziplm: the narrowest blocks take {least / 1e6:.3g} ms and {limit / 1e6:.3g} ms are left for a "
                f"speedup of {speedup}: ask for less, or for kinds [channel, head]"
            )
        unit = -(-limit // _STEPS)  # a table of this many steps, in which no time is rounded down
        weights, limit = [{w: -(-t // unit) for w, t in x.items()} for x in weights], limit // unit
    chosen = dict(zip(parts, widths(errors, weights, limit)[0], strict=True))
    stays = {(n, key): highest(scores[n][key], width) for (n, key), width in chosen.items()}
    return Decision(
        tuple(range(sizes.blocks)),
        {(n, int(key.partition(".")[2])): kept for (n, key), kept in stays.items() if key != "heads"},
        {n: kept for (n, key), kept in stays.items() if key == "heads"},
        spread=True,
    )


def by_width(scores: Sequence[float]) -> dict[int, float]:
    """From the scores of units the error of every width, 0 included."""
    left = sorted(scores)
    return {len(left) - n: left[n - 1] if n else 0.0 for n in range(len(left) + 1)}


def run(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Options) -> Decision:
    """The units that would leave last: in every block as many, or as many as `divided` says."""
    if sizes.spread:
        return divided(scores, units, sizes, o.speedup or 1.0)
    return best_units(scores, units, sizes)


METHOD = Edit(
    paper="Kurtic et al. 2023, arXiv 2302.04089",
    options=Options,
    needs=("gram",),
    covers={
        "ziplm": [
            {"method": "ziplm", "options": {"speedup": 1.2, "uniform": False, "timed": "a100"}},
            {"method": "refit"},
        ],
    },
    sizes=sizes,
    run=run,
    score=score,
    timed=lambda o: None if o.speedup is None else Timing(o.timed, o.timed_tokens, o.multiple, o.points),
)
