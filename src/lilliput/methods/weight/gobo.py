"""GOBO: weights that a Gaussian does not explain stay floats, all others share 2^b centroids of their matrix.

mu and sigma are the mean and deviation of all weights of a linear. The `outliers` share of weights of least likelihood
log N(w; mu, sigma^2), which are those farthest from mu, goes to a sparse part in float32. The others are put in order
and cut into 2^b bins of equal population, whose means are the first centroids; then, in turns, each weight goes to the
nearest centroid and each centroid to the mean of its weights, until the sum of |w - c| no longer falls: the centroids
of the least sum are kept.

The paper cuts at a log-likelihood of -4, which leaves about 0.1 % outside; here the share is fixed, so that the size is
known before the weights are.

Paper: Zadeh et al. 2020, arXiv 2005.03842.
Cost: O(out * in * b) for each of at most 100 steps, usually fewer than 10. Limits: data free; one table for a whole
matrix cannot follow rows of different size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats.codebook import CodebookFormat, from_target
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.parts.sparse import SparseSpec, gather
from lilliput.recipe import Strict, Target
from lilliput.stats.site import SiteStats

PAPER = "Zadeh et al. 2020, arXiv 2005.03842"
NEEDS: tuple[str, ...] = ()
WRITES: Literal["quantized"] = "quantized"
FORMATS = ("codebook",)
ROWWISE = False
BASELINE: str | None = None
COVERS: Mapping[str, list[dict[str, Any]] | None] = {
    "gobo": [{"method": "gobo", "target": {"format": "codebook", "bits": 3, "group_size": "tensor"}}],
}
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
    form.check(rows, width)
    return Scheme((QuantizedSpec(form), sparse))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes and sparse values for what the layer's parts leave over; outside the support they add up to 0.

    Raises PlanError without bits in the target or with another group size, LilliputError for a weight that is not
    finite.
    """
    form, sparse = _parts(target, o)
    weight = layer.rest()
    inside = torch.ones_like(weight, dtype=torch.bool) if layer.support is None else layer.support
    weight = torch.where(inside, weight, 0.0)
    if not bool(torch.isfinite(weight).all()):
        raise LilliputError(f"{layer.name}: the weight holds NaN or infinite values: it cannot be quantized")
    mean = weight[inside].double().mean() if bool(inside.any()) else weight.new_zeros(())
    far = torch.where(inside, (weight - mean).abs().float(), -1.0)
    chosen = gather(torch.ones_like(weight), far, sparse.share).decode() > 0
    values = weight[inside & ~chosen].sort().values
    levels = _centroids(values, form.levels)
    if not bool(inside.all()):
        levels[levels.abs().argmin()] = 0.0
    table = form.table(levels[None, None])
    part = QuantizedPart(form, form.encode(weight, table), table)
    return layer.with_part(part, gather(weight - part.decode(), chosen.float(), sparse.share, sparse.dtype))


def _centroids(values: Tensor, count: int) -> Tensor:
    """Float32 [count], ascending, for sorted values [n]; the best centroids seen, by the sum of |w - c|."""
    if not len(values):
        return torch.zeros(count, device=values.device)
    values = values.double()
    label = (torch.arange(len(values), device=values.device) * count).div(len(values), rounding_mode="floor")
    levels = _means(values, label, values.new_zeros(count))
    # Fewer weights than bins leave bins empty: they take the neighbour below.
    empty = torch.bincount(label, minlength=count) == 0
    levels = torch.where(empty, values[0], levels).cummax(0).values
    best, least = levels, float("inf")
    for _ in range(_STEPS):
        label = torch.searchsorted((levels[1:] + levels[:-1]) / 2, values)
        cost = float((values - levels[label]).abs().sum())
        if cost >= least:
            break
        best, least = levels, cost
        levels = _means(values, label, levels)
    return best.float()


def _means(values: Tensor, label: Tensor, empty: Tensor) -> Tensor:
    """The mean of each label's values, [count]; `empty` where it has none."""
    count = torch.bincount(label, minlength=len(empty))
    total = torch.bincount(label, values, minlength=len(empty))
    return torch.where(count > 0, total / count, empty)
