"""SmoothQuant: move the spread of the inputs' channels into the weights.

For a norm and the linears that read it: s_j = max|X_j|^a / max_o |W_oj|^(1-a), the maximum over all readers; the norm's
gain (and bias) is divided by s, the readers' columns are multiplied by it. The function stays the same; inputs become
easier to quantize and weights harder. a = 0.5 suits OPT and BLOOM, 0.75 GLM, 0.8 to 0.9 the LLaMA family.

Today inputs stay at 16 bits in everything that is written: the step prepares a model for W8A8, and the recipe quantizes
the weights alone, W8A16. What the method is made for, 8-bit inputs, an engine has to add.

Paper: Xiao et al. 2023, arXiv 2211.10438.
Cost: none beyond the inputs' maxima. Limits: made for 8-bit inputs; alone it does not help 4-bit weights. Channels that
are zero in the inputs or in all weights keep their scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from lilliput.folds.kinds import ScaleFold
from lilliput.target import Strict, Target
from lilliput.verbs.rewrite import Rewrite
from lilliput.verbs.view import BlockIO, BlockView


class Options(Strict):
    """`alpha` 0: only the weights are evened out, 1: only the inputs."""

    alpha: float = Field(0.5, ge=0.0, le=1.0, description="share of the inputs' spread that moves into the weights")
    links: Literal["norm", "all"] = Field("norm", description="after norms only, or wherever a scale may move")
    least: float = Field(1e-5, gt=0.0, description="smallest scale")


def rewrite(block: BlockView, io: BlockIO, target: Target, o: Options) -> Sequence[ScaleFold]:
    """One fold per link whose site saw tokens."""
    folds: list[ScaleFold] = []
    for link in block.anatomy.links:
        readers = [block.weights[name] for name in link.readers if name in block.weights]
        stats = io.stats.get(link.site)
        if (o.links == "norm" and link.kind != "norm") or not readers or stats is None or stats.count == 0:
            continue
        inputs = link.tie(stats.need("absmax"))
        weights = link.tie(torch.stack([w.abs().amax(0) for w in readers]).amax(0))
        scale = (inputs.pow(o.alpha) / weights.pow(1.0 - o.alpha)).clamp(min=o.least)
        alive = (inputs > 0) & (weights > 0) & torch.isfinite(scale)
        folds.append(ScaleFold(link, torch.where(alive, scale, 1.0).float()))
    return folds


METHOD = Rewrite(
    paper="Xiao et al. 2023, arXiv 2211.10438",
    options=Options,
    needs=("absmax",),
    covers={
        "smoothquant": [
            {"method": "smoothquant"},
            {"method": "rtn", "target": {"bits": 8, "group_size": "channel"}, "options": {"search": "minmax"}},
        ],
    },
    run=rewrite,
)
