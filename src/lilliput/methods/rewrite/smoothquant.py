"""SmoothQuant: move the spread of the inputs' channels into the weights.

For a norm and the linears that read it: s_j = max|X_j|^a / max_o |W_oj|^(1-a), the maximum over all readers; the norm's
gain (and bias) is divided by s, the readers' columns are multiplied by it. The function stays the same; inputs become
easier to quantize and weights harder. a = 0.5 suits OPT and BLOOM, 0.75 GLM, 0.8 to 0.9 the LLaMA family.

A step of the verb inputs behind the weights' one rounds the inputs, such as act-static-dynamic: W8A8. Without it the
recipe quantizes the weights alone, W8A16, and the even inputs serve an engine that rounds them itself.

`scale: fptq` is FPTQ's (Li et al. 2023, arXiv 2308.15987): s_j = max|X_j| / log2(2 + max|X_j|), for the inputs of sites
whose largest lies between `smallest` and `largest`, whatever the weights are; others are left alone.

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
    scale: Literal["smoothquant", "fptq"] = Field("smoothquant", description="which formula gives s")
    smallest: float = Field(15.0, ge=0.0, description="scale fptq: sites whose largest input is below are left alone")
    largest: float = Field(150.0, ge=0.0, description="scale fptq: sites whose largest input is this or more, too")


def rewrite(block: BlockView, io: BlockIO, target: Target, o: Options) -> Sequence[ScaleFold]:
    """One fold per link whose site saw tokens."""
    folds: list[ScaleFold] = []
    for link in block.anatomy.links:
        readers = [block.weights[name] for name in link.readers if name in block.weights]
        stats = io.stats.get(link.site)
        if (o.links == "norm" and link.kind != "norm") or not readers or stats is None or stats.count == 0:
            continue
        inputs = link.tie(stats.need("absmax"))
        if o.scale == "fptq":
            if o.smallest <= float(inputs.max()) < o.largest:
                scale = (inputs / torch.log2(2.0 + inputs)).clamp(min=o.least)
                folds.append(ScaleFold(link, torch.where(inputs > 0, scale, 1.0).float()))
            continue
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
