"""RPTQ: channels of alike ranges share a static range.

Each channel j of a linear's inputs has a range (min X_j, max X_j) over the calibration text. `clusters` groups of
channels are found, and each group g has its own scale and zero point: s_g = (max_g - min_g) / (2^b - 1), z_g =
round(-2^(b-1) - min_g / s_g), with 0 inside the range.

`by: kmeans` finds the groups with k-means on the points (min X_j, max X_j), from centres at evenly spaced places of the
channels in order of their range, until nothing changes. `by: range` is PEG-quant (peg-quant): the channels in order of
their range, cut into groups of equal size; G = 6 to 8 there, of BERT's embedding.

The paper then permutes channels, so that those of a group lie beside each other: in the gain of a norm, the rows of
what writes them and the columns of what reads them. That serves kernels and changes no value, and is not done here: a
byte for each channel says its group. One group is a static scale for all inputs, as many as there are channels one for
each of them.

Papers: Yuan et al. 2023, RPTQ, arXiv 2304.01089; Bondarenko et al. 2021, arXiv 2109.12948 (PEG).
Cost: the inputs' extremes, and k-means of two numbers a channel. Limits: ranges are those of the calibration text, and
what lies outside is cut. A product over channels of several scales is one product a group, summed.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.parts.inputs.clusters import CLUSTER, MOST, ClusterInput
from lilliput.parts.inputs.grid import InputGrid, InputSpec
from lilliput.parts.inputs.uniform import SCALE, ZERO
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.inputs import Inputs

_ROUNDS = 100


class Options(Strict):
    """See the module's docstring."""

    clusters: int = Field(8, ge=1, le=MOST, description="groups of channels; in a narrower linear one for each channel")
    by: Literal["kmeans", "range"] = Field("kmeans", description="k-means of ranges, or equal groups in their order")


def spec(target: Target, o: Options, width: int) -> InputSpec:
    """The grid. Raises PlanError for what cannot be."""
    return ClusterInput(target.bits or 8, min(o.clusters, width), target.symmetric)


def inputs(layer: Layer, stats: SiteStats, target: Target, o: Options) -> InputGrid:
    """The groups of a layer's inputs, and their ranges."""
    form = ClusterInput(target.bits or 8, min(o.clusters, stats.width), target.symmetric)
    low, high = stats.need("low"), stats.need("high")
    place = kmeans(torch.stack([low, high], 1), form.count) if o.by == "kmeans" else slices(high - low, form.count)
    zeros = torch.zeros(form.count, device=low.device)
    least, most = (zeros.scatter_reduce(0, place, x, how) for x, how in ((low, "amin"), (high, "amax")))
    scale, zero = form.channels.parameters(least, most)
    tensors = {CLUSTER: place.to(torch.uint8).cpu(), SCALE: scale.float().cpu()}
    return InputGrid(form, tensors if zero is None else tensors | {ZERO: zero.to(torch.int32).cpu()})


def kmeans(points: Tensor, count: int) -> Tensor:
    """The cluster of each point [n, 2], int64 [n]; the same for the same points."""
    points = points.double()
    order = (points[:, 1] - points[:, 0]).argsort(stable=True)
    places = ((torch.arange(count, device=points.device) + 0.5) * len(points) / count).long()
    centres = points[order[places]]
    found = torch.full((len(points),), -1, device=points.device)
    for _ in range(_ROUNDS):
        before, found = found, torch.cdist(points, centres).argmin(1)
        if torch.equal(before, found):
            break
        size = torch.bincount(found, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, found, points)
        centres = torch.where(size[:, None] > 0, sums / size.clamp(min=1)[:, None], centres)
    return found


def slices(size: Tensor, count: int) -> Tensor:
    """The place of each of n numbers in their order, cut into `count` groups as equal as can be: int64 [n]."""
    rank = torch.empty_like(size, dtype=torch.int64)
    rank[size.argsort(stable=True)] = torch.arange(len(size), device=size.device)
    return rank * count // len(size)


METHOD = Inputs(
    paper="Yuan et al. 2023, arXiv 2304.01089",
    options=Options,
    needs=("low", "high"),
    formats=("int",),
    covers={
        "rptq": [
            {"method": "rtn", "target": {"bits": 4}},
            {"method": "rptq", "target": {"bits": 8, "symmetric": False}},
        ],
        "peg-quant": [
            {"method": "rtn", "target": {"bits": 8, "group_size": "channel"}},
            {"method": "rptq", "target": {"bits": 8, "symmetric": False}, "options": {"clusters": 6, "by": "range"}},
        ],
    },
    run=inputs,
    spec=spec,
)
