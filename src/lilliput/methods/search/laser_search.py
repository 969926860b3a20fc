"""LASER's search: the matrices, and their ranks, whose higher terms the model does better without.

For each linear that the next step (`laser`) covers in the last blocks, and each share of its ranks in `kept`, the loss
of the whole model on calibration text when this one alone is lowered. Those that lower the loss are then combined, the
best first, each at its best rank: one is kept if the loss falls further. All other linears are left unchanged; if
nothing lowers the loss, all of them are.

The result is specific to the text, so it should be text of the task: `--data` takes a file of your own, of which a part
(`share`) is used. The authors try about ten ranks of every matrix in all blocks, and find gains in the late ones,
mostly at the lowest ranks of the matrices that enter an MLP: `--set laser-search.late=1 --set
laser-search.kept=[0.9,0.5,0.25,0.1,0.05,0.01]`, and `where` of the next step, widen the search. That step's own `kept`
is then ignored.

Paper: Sharma et al. 2023, arXiv 2312.13558.
Cost: for each candidate a decomposition, and a forward pass from its block on over the samples that are looked at.
Limits: differences of losses below what the arithmetic resolves decide too; a fall on few samples may be chance, so
measure the result on other text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import Field

from lilliput.errors import LilliputError
from lilliput.methods.weight import laser
from lilliput.target import Strict, Target
from lilliput.units import few
from lilliput.verbs.scores import Budget, Loss
from lilliput.verbs.search import Search

_SHOWN = 5


class Options(Strict):
    """See the module's docstring."""

    kept: tuple[float, ...] = Field((0.01, 0.1, 0.5), min_length=1, description="shares of the ranks to try")
    late: float = Field(0.5, gt=0.0, le=1.0, description="share of the blocks to search, from the last")
    share: float = Field(0.2, gt=0.0, le=1.0, description="share of the calibration samples that is used")


def refuse(target: Target, o: Options) -> str | None:
    """Why a step with this target cannot have its ranks searched."""
    wrong = [share for share in o.kept if not 0.0 < share <= 1.0]
    if wrong:
        return f"a share of {wrong[0]} of the ranks: kept takes numbers above 0, to 1"
    if target.rank is not None or target.ratio is not None:
        return "the step that follows names its rank already: leave out target.rank and target.ratio, or this step"
    return None


def looked_at(samples: int, o: Options) -> int:
    """How many of the calibration samples the losses are taken over; at least 1."""
    return max(1, math.ceil(o.share * samples - 1e-9))


def passes(linears: int, o: Options) -> float:
    """Forward passes through all blocks that trying `linears` linears amounts to."""
    return 1 + o.late * linears * len(o.kept) * o.late / 2


def search(loss: Loss, budget: Budget, o: Options) -> tuple[Mapping[str, Target], str]:
    """A rank for each linear that is lowered, ratio 1 for all others, and what was found in words.

    Raises LilliputError where the loss of the model as it is is not finite.
    """
    blocks = sorted({share.block for share in budget.values()})
    first = blocks[len(blocks) - math.ceil(o.late * len(blocks) - 1e-9)]
    ranks = {name: _ranks(share.shape, o) for name, share in budget.items() if share.block >= first}
    remaining = sum(len(some) for some in ranks.values())
    more = max(0, len(ranks) - 1)  # what combining them may ask for after that
    least = before = loss({}, remaining + more)
    if not math.isfinite(before):
        raise LilliputError("the loss of the unchanged model is not finite: check the calibration text, or the dtype")
    better: list[tuple[float, str, Target]] = []
    for name, some in ranks.items():
        trials = []
        for rank in some:
            remaining -= 1
            target = budget[name].target.model_copy(update={"rank": rank, "ratio": None})
            value = loss({name: target}, remaining + more)
            if value < before:
                trials.append((value, rank, target))
        if trials:
            value, _, target = min(trials, key=lambda x: x[:2])
            better.append((value, name, target))
    chosen: dict[str, Target] = {}
    for number, (value, name, target) in enumerate(sorted(better, key=lambda x: x[0])):
        together = {**chosen, name: target}
        now = value if not chosen else loss(together, len(better) - number - 1)
        if now < least:
            chosen, least = together, now
    whole = {name: share.target.model_copy(update={"rank": None, "ratio": 1.0}) for name, share in budget.items()}
    return {**whole, **chosen}, _said(chosen, len(ranks), before, least)


def _ranks(shape: tuple[int, int], o: Options) -> list[int]:
    """The ranks to try, rising, below the largest."""
    candidates = {laser.rank_of(Target(), laser.Options(kept=share), *shape) for share in o.kept}
    return sorted(rank for rank in candidates if rank is not None and rank < min(shape))


def _said(chosen: Mapping[str, Target], count: int, before: float, after: float) -> str:
    if not chosen:
        return f"laser-search: none of {count} linears lowers the loss ({before:.4f}); all are left unchanged."
    names = [f"{name} to rank {target.rank}" for name, target in chosen.items()]
    return (
        f"laser-search: {len(chosen)} of {count} linears lowered, loss on the samples {before:.4f} to {after:.4f}: "
        f"{few(names, _SHOWN)}."
    )


METHOD = Search(
    paper="Sharma et al. 2023, arXiv 2312.13558",
    options=Options,
    needs=(),
    covers={
        "laser-search": [
            {"method": "laser-search"},
            {"method": "laser", "where": {"include": [f"*.mlp.{name}" for name in laser.MLP_INPUT]}},
        ],
    },
    run=search,
    refuse=refuse,
    governs=("laser",),
    looked_at=looked_at,
    passes=passes,
)
