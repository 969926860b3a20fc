"""Experts that their router treats alike become one: the average of their weights, by how often each was used.

In every block the `experts` that most tokens chose stand for groups, and each other expert i joins the one, j, that it
is most like: the cosine between their logits s_i and s_j over the calibration tokens ("logits"), or between their rows
of the router ("rows"). With n_i the tokens that chose expert i, a group g becomes W_g = sum of n_i W_i / sum of n_i,
the same for gate, up and down; where no token chose any of a group, all count alike. The router keeps the row of the
expert that stands for the group. Experts that are equal give exactly that expert, and one that no token chose changes
nothing of the others in its group.

The authors also bring the hidden channels of a group's experts into one order before they average, and leave the router
all rows, several for one expert; here channels stay in their order, as experts that began as copies of one MLP have
them, and no stock config has more rows than experts.

Paper: Li et al. 2023, arXiv 2310.01334.
Cost: one forward pass, and weights of a whole group read for each that is written. Limits: experts that were trained
from different beginnings average badly: compare with `expert-pruning`; `refit` after a step that takes hidden channels
passes over averages, which have no counterpart in the unedited model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.model.edit import Edit as Decision
from lilliput.model.edit import Shares, router_of
from lilliput.stats.routing import cosines
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Fewer, Sizes, Units, best_units, fewer


class Options(Fewer):
    """See the module's docstring."""

    by: Literal["logits", "rows"] = Field(
        "logits", description="experts are alike by the cosine of their logits over the text, or of their router rows"
    )


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """The share of the tokens of each expert, and how alike each two are; nothing for a block without experts."""
    router = router_of(view.anatomy)
    if router is None or io.routing is None:
        return {}
    if o.by == "logits":
        alike = io.routing.alike()
    else:
        rows = view.weight(router).double().cpu()
        alike = cosines(rows @ rows.T)
    return {"experts": tuple(io.routing.means("chosen").tolist()), "experts.alike": tuple(alike.flatten().tolist())}


def run(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Options) -> Decision:
    """The experts that most tokens chose, each with those that are most like it."""
    chosen = best_units(scores, units, sizes)
    merged = {n: grouped(scores[n]["experts"], scores[n]["experts.alike"], kept) for n, kept in chosen.experts.items()}
    return replace(chosen, merged=merged)


def grouped(used: Sequence[float], alike: Sequence[float], kept: Sequence[int]) -> tuple[Shares, ...]:
    """For each of the experts `kept` the group that it stands for, with shares by how much each is used."""
    use = torch.tensor(used, dtype=torch.float64)
    likeness = torch.tensor(alike, dtype=torch.float64).view(len(use), len(use))
    columns = torch.tensor(kept, dtype=torch.int64)
    home: Tensor = columns[likeness[:, columns].argmax(1)]
    home[columns] = columns
    groups: list[Shares] = []
    for first in kept:
        members = (home == first).nonzero()[:, 0]
        weights = use[members]
        total = float(weights.sum())
        shares = weights / total if total > 0.0 else torch.full_like(weights, 1.0 / len(members))
        groups.append(tuple(zip(members.tolist(), shares.tolist(), strict=True)))
    return tuple(groups)


METHOD = Edit(
    paper="Li et al. 2023, arXiv 2310.01334",
    options=Options,
    needs=(),
    covers={},
    sizes=fewer,
    run=run,
    score=score,
    routed=lambda o: True,
)
