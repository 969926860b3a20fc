"""ZipLM: hidden channels and heads leave one after the other, each time whichever the others can best make up for.

With H = XT X of the inputs of a linear W that reads the units, and the columns S of one of them, losing it costs

    tr(W_S ([H^-1]_SS)^-1 W_ST)

when the columns that stay are changed as they should be. The cheapest unit leaves, H^-1 and W are brought up to date,
and the costs are taken anew, until none is left. A unit's score is the error of all that have left with it, as a share
of the linear's output: the order of removal, and for every width the error that it costs.

Paper: Kurtic et al. 2023, arXiv 2302.04089. Its update of the columns that stay is what `refit` after this step solves.
The paper chooses a width for each block, from such errors and a table of measured times, by dynamic programming:
`widths` does that. With `uniform: false` the step does so with weights in place of times.
Cost: one forward pass, and about 5 in^3 for each linear that reads units. Limits: dense inputs are seen, not those
after earlier blocks have lost something; errors are of single linears; no times are measured.
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


class Options(Thinning):
    """See the module's docstring."""

    damping: float = Field(0.01, gt=0.0, description="added to the diagonal of H, as a share of its mean")


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


def divided(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes) -> Decision:
    """Blocks of their own widths that keep no more weights than blocks of `sizes` alike, at the least sum of errors.

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
            step = 1 if head else sizes.multiple
            highest(scores[n][key], count)  # refuses NaN, among which no least sum is found
            whole = len(scores[n][key])
            errors.append({w: e for w, e in by_width(scores[n][key]).items() if w and (w % step == 0 or w == whole)})
            weights.append({w: w * cost for w in errors[-1]})
            parts.append((n, key))
            limit += count * cost
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
        return divided(scores, units, sizes)
    return best_units(scores, units, sizes)


METHOD = Edit(
    paper="Kurtic et al. 2023, arXiv 2302.04089",
    options=Options,
    needs=("gram",),
    covers={
        "ziplm": [{"method": "ziplm"}, {"method": "refit"}],
    },
    sizes=thinned,
    run=run,
    score=score,
)
