"""GOBO: weights that a Gaussian does not explain stay floats, all others share 2^b centroids of their matrix.

mu and sigma are the mean and deviation of all weights of a linear. The `outliers` share of weights of least likelihood
log N(w; mu, sigma^2), which are those farthest from mu, goes to a sparse part in float32. The others are put in order
and cut into 2^b bins of equal population, whose means are the first centroids; then, in turns, each weight goes to the
nearest centroid and each centroid to the mean of its weights, until the sum of |w - c| no longer falls: the centroids
of the least sum are kept.

The paper cuts at a log-likelihood of -4, which leaves about 0.1 % outside; here the share is fixed, so that the size is
known before the weights are.

Paper: Zadeh et al. 2020, arXiv 2005.03842.
Cost: a sort of each matrix, and O(2^b log(out * in)) for each of at most 100 steps. Limits: data free; one
table for a whole matrix cannot follow rows of different size.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats.codebook import CodebookFormat, from_target
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.parts.sparse import SparseSpec, highest, pick
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

_STEPS = 100


class Options(Strict):
    """The paper's cut, as a share."""

    outliers: float = Field(0.001, ge=0.0, le=1.0, description="share of weights that stay float32")


def _parts(target: Target, o: Options) -> tuple[CodebookFormat, SparseSpec]:
    form = from_target(target)
    if form.group_size != 0:
        raise PlanError("gobo has one table for a whole matrix: set target.group_size to tensor, or use squeezellm")
    return form, SparseSpec(o.outliers, torch.float32)


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """Codes with one table, and a sparse part. Raises PlanError for another group size than tensor."""
    form, sparse = _parts(target, o)
    return Scheme((QuantizedSpec(form), sparse))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes and sparse values for the remainder after the layer's parts; outside the support they add up to 0.

    Raises PlanError without bits in the target or with another group size, LilliputError for a weight that is not
    finite.
    """
    form, sparse = _parts(target, o)
    weight = layer.rest()
    inside = torch.ones_like(weight, dtype=torch.bool) if layer.support is None else layer.support
    weight = torch.where(inside, weight, 0.0)
    if not bool(torch.isfinite(weight).all()):
        raise LilliputError(f"{layer.name}: the weight contains NaN or infinity: it cannot be quantized")
    mean = weight[inside].double().mean() if bool(inside.any()) else weight.new_zeros(())
    far = torch.where(inside, (weight - mean).abs().float(), -1.0)
    chosen = highest(far, sparse.share)
    values = weight[inside & ~chosen].sort().values
    levels = _centroids(values, form.levels)
    if not bool(inside.all()):
        levels[levels.abs().argmin()] = 0.0
    table = form.table(levels[None, None])
    part = QuantizedPart(form, form.encode(weight, table), table)
    return layer.with_part(part, pick(weight - part.decode(), chosen, sparse.share, sparse.dtype))


def _centroids(values: Tensor, count: int) -> Tensor:
    """Float32 [count], ascending, for sorted values [n]; the best centroids seen, by the sum of |w - c|.

    A cluster of sorted values is an interval, so its sums are differences of prefix sums.
    """
    n = len(values)
    if not n:
        return torch.zeros(count, device=values.device)
    values = values.double()
    sums = torch.nn.functional.pad(values.cumsum(0), (1, 0))
    ends = torch.arange(count + 1, device=values.device) * n
    # Fewer weights than bins leave bins empty: they take the neighbour below.
    levels = _means(sums, -(-ends // count), values[:1].expand(count)).cummax(0).values
    best, least = levels, float("inf")
    for _ in range(_STEPS):
        inner = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2, right=True)
        bounds = torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=n)
        at = torch.minimum(torch.maximum(torch.searchsorted(values, levels), bounds[:-1]), bounds[1:])
        below = levels * (at - bounds[:-1]) - (sums[at] - sums[bounds[:-1]])
        above = (sums[bounds[1:]] - sums[at]) - levels * (bounds[1:] - at)
        cost = float((below + above).sum())
        if cost >= least:
            break
        best, least = levels, cost
        levels = _means(sums, bounds, levels)
    return best.float()


def _means(sums: Tensor, bounds: Tensor, empty: Tensor) -> Tensor:
    """The mean of the values between neighbouring cuts, [count]; `empty` where there are none."""
    size = bounds.diff()
    return torch.where(size > 0, sums[bounds].diff() / size.clamp(min=1), empty)


METHOD = Compress(
    paper="Zadeh et al. 2020, arXiv 2005.03842",
    options=Options,
    needs=(),
    writes="quantized",
    formats=("codebook",),
    covers={
        "gobo": [{"method": "gobo", "target": {"format": "codebook", "bits": 3, "group_size": "tensor"}}],
    },
    run=compress,
    scheme=scheme,
)
