"""SqueezeLLM: codebooks by sensitivity-weighted k-means, and a sparse part for sensitive weights and outliers.

F = mean_n (dL_n / dW)^2 over calibration samples is the diagonal Fisher information, L_n the mean cross-entropy of
sample n. The `sensitive` share of all weights with the largest F and the `outliers` share of the others with the
largest |w| go to a sparse part; for each row 2^b levels minimise sum_j F_ij (w_ij - c)^2 over the weights that are left
(if all F are 0, all count alike). The sparse part holds what the nearest level misses of its weights.

Without gradients (`weigh: gram`, beyond the paper): the mean square of the input takes F's place in k-means, and that
times w^2 the place of F among the sensitive; `weigh: none` is plain k-means, with |w| deciding for both shares.

Paper: Kim et al. 2024, arXiv 2306.07629.
Cost: out * in * log(in) for k-means; the Fisher information takes two forward passes and one backward pass over the
calibration text, and 4 bytes of disk for each weight. Limits: F describes the calibration text, and it sees each weight
by itself: errors are not balanced against each other. Sparse values are float16 (float32 if the levels are). Shares are
of a linear, so that its size is known before.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra.masks import largest
from lilliput.formats.codebook import CodebookFormat, from_target
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.parts.sparse import SparseSpec, highest, pick
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress


class Options(Strict):
    """The paper's shares."""

    sensitive: float = Field(0.0005, ge=0.0, le=1.0, description="share of weights kept for their sensitivity")
    outliers: float = Field(0.004, ge=0.0, le=1.0, description="share of weights kept for their size")
    weigh: Literal["fisher", "gram", "none"] = Field(
        "fisher", description="sensitivity: squared gradients, or the inputs' mean square, or none"
    )
    fisher_samples: int | None = Field(
        None, ge=1, description="calibration samples for the Fisher statistic; none: all"
    )


def needs(o: Options) -> tuple[str, ...]:
    return {"fisher": ("fisher",), "gram": ("square",), "none": ()}[o.weigh]


def _sparse(target: Target, o: Options) -> SparseSpec | None:
    share = min(o.sensitive + o.outliers, 1.0)
    dtype = torch.float32 if target.scale_dtype == "float32" else torch.float16
    return SparseSpec(share, dtype) if share > 0 else None


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """Codes with tables, and a sparse part. Raises PlanError without bits in the target."""
    form = from_target(target)
    sparse = _sparse(target, o)
    return Scheme((QuantizedSpec(form),) if sparse is None else (QuantizedSpec(form), sparse))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes and sparse values for the remainder after the layer's parts; outside the support they add up to 0.

    Raises PlanError without bits in the target, LilliputError for a weight, statistic or Fisher information that is not
    finite.
    """
    form, sparse = from_target(target), _sparse(target, o)
    weight = layer.rest()
    holes = None if layer.support is None else ~layer.support
    if holes is not None:
        weight = weight.masked_fill(holes, 0.0)
    importance, sensitivity = torch.ones_like(weight), weight.abs()
    if o.weigh == "fisher":
        importance = sensitivity = layer.need_fisher()
    elif o.weigh == "gram" and stats.count:
        importance = stats.second_moment().expand(weight.shape)
        sensitivity = importance * weight.square()
    if holes is not None:
        importance = importance.masked_fill(holes, 0.0)
    if sparse is None:
        table = form.fit(weight, importance=importance, zero=holes)
        return layer.with_part(QuantizedPart(form, form.encode(weight, table), table))
    score = _score(weight, sensitivity, holes, round(o.sensitive * weight.numel()))
    chosen = highest(score, sparse.share)
    del score
    table = form.fit(weight, importance=_left(importance, chosen, holes, form), zero=holes)
    part = QuantizedPart(form, form.encode(weight, table), table)
    sparse_part = pick(weight - part.decode(), chosen, sparse.share, sparse.dtype)
    return layer.with_part(part, sparse_part)


def _left(importance: Tensor, chosen: Tensor, holes: Tensor | None, form: CodebookFormat) -> Tensor:
    """The importance of what the codebook is left with; where that is nothing but zeros, all of it counts alike."""
    out = importance.masked_fill(chosen, 0.0)
    total = out.sum() if form.group_size == 0 else out.sum(1, keepdim=True)
    alike = ~chosen if holes is None else ~(chosen | holes)
    return torch.where(total == 0, alike.float(), out)


def _score(weight: Tensor, sensitivity: Tensor, holes: Tensor | None, count: int) -> Tensor:
    """What goes to the sparse part first: the `count` most sensitive, then by size, and holes last."""
    size = weight.abs()
    if holes is not None:
        size, sensitivity = size.masked_fill(holes, -1.0), sensitivity.masked_fill(holes, -1.0)
    first = largest(sensitivity.reshape(1, -1), count).view_as(weight)
    return torch.where(first & (size >= 0), 2 * size.max() + 1, size)


METHOD = Compress(
    paper="Kim et al. 2024, arXiv 2306.07629",
    options=Options,
    needs=("fisher", "square"),
    reads=needs,
    fisher_samples=lambda o: o.fisher_samples,
    writes="quantized",
    formats=("codebook",),
    baseline=None,  # its loss weighs by gradients, not by inputs
    covers={
        "squeezellm": [{"method": "squeezellm", "target": {"format": "codebook", "bits": 4, "group_size": "channel"}}],
    },
    run=compress,
    scheme=scheme,
    rowwise=False,  # the shares are of one linear
)
