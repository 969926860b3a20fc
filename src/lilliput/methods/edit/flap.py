"""FLAP: hidden channels and heads leave whose outputs fluctuate least, weighed by the weights that read them.

At the inputs of the down and o projections, with the variance v_j of channel j over the calibration tokens, a channel's
score is S_j = v_j |W_:,j|^2 (WIFV): what stays of its contribution once its mean is taken up by a bias. Heads: the mean
of their channels' scores, after the square of each. With `uniform: false` z-scores are compared over the whole model,
as in the paper, and blocks get different widths; by default every block keeps as many, because engines read one config
for all of them (`ratio` is taken from each kind as `kinds` says: heads rounded down, channels for the rest). Within a
block the order is the same.

A channel's mean contribution, W_:,P x_P, is lost to a model without biases: `refit` after this step makes up for more
than that, by least squares on the channels that stay.

Paper: An et al. 2024, arXiv 2312.11983; by default channels alone leave: few key-value heads are too coarse.
Cost: one forward pass. Limits: variances describe the calibration text; dense activations are seen, not pruned ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.model.edited import Edit as Decision
from lilliput.model.edited import heads_of
from lilliput.stats.site import SiteStats
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Sizes, Thinning, Units, best_units, spread_units, thinned


class Options(Thinning):
    """See the module's docstring."""

    metric: Literal["wifv", "wifn"] = Field("wifv", description="wifv: variance; wifn: mean square, no bias assumed")


def score(view: EditView, io: EditIO, o: Options) -> EditScores:
    """The fluctuation of every channel and head."""
    block = view.anatomy
    scores: dict[str, tuple[float, ...]] = {}
    for m, mlp in enumerate(block.groups.channels):
        total = torch.zeros(mlp.width, dtype=torch.float64)
        for name in mlp.readers:
            total += _fluctuation(view, io, name, o)
        scores[f"channels.{m}"] = tuple(total.tolist())
    heads = []
    seen: dict[str, Tensor] = {}
    for group in heads_of(block):
        values = []
        for name, axis, (a, b) in group.members:
            if axis == "columns":
                if name not in seen:
                    seen[name] = _fluctuation(view, io, name, o).square()
                values.append(seen[name][a:b])
        heads.append(float(torch.cat(values).mean()))
    if heads:
        scores["heads"] = tuple(heads)
    return scores


def _fluctuation(view: EditView, io: EditIO, name: str, o: Options) -> Tensor:
    """S_j of the inputs of a linear, float64 [in]."""
    stats: SiteStats = io.stats[view.anatomy.linear(name).site]
    spread = stats.second_moment().double()
    if o.metric == "wifv":
        spread = (spread - stats.need("mean").double().square()).clamp_(min=0.0)
    return (spread * view.weight(name).double().square().sum(0)).cpu()


def run(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Options) -> Decision:
    """The units that fluctuate most."""
    if sizes.spread:
        normal = [{key: _standard(values) for key, values in x.items()} for x in scores]
        return spread_units(normal, units, sizes, per_weight=False)
    return best_units(scores, units, sizes)


def _standard(values: Sequence[float]) -> tuple[float, ...]:
    """z-scores of the units of one kind of a block."""
    each = torch.tensor(values, dtype=torch.float64)
    spread = each.std(correction=0) if len(each) > 1 else torch.zeros((), dtype=torch.float64)
    return tuple(((each - each.mean()) / spread.clamp(min=1e-30)).tolist())


METHOD = Edit(
    paper="An et al. 2024, arXiv 2312.11983",
    options=Options,
    needs=("square", "mean"),
    covers={
        "flap": [{"method": "flap"}, {"method": "refit"}],
    },
    sizes=thinned,
    run=run,
    score=score,
)
