"""Learned codebooks: 2^b levels for each row, tensor or group by weighted k-means, then a sweep over them as in GPTQ.

Levels minimise sum_j h_j (w_j - c(w_j))^2, c(w) the nearest level, by Lloyd's steps on the sorted weights of a unit; h
is 1, mean x_j^2, 1 / U_jj^2 (what GPTQ's loss weighs a rounding error of column j with, H^-1 = UT U), or the Fisher
information mean_n (dL_n / dw)^2. Levels are rounded to their stored type. Then, for `sweep`, minimise
tr(D H DT), D = W - What, H = XT X + damping * mean(diag) * I: column by column, q = the nearest level of the row's
table, e = (w_j - q) / U_jj, w_k -= e U_jk for all k > j.

Beyond the papers: the sweep over learned levels; `shrinkage`, as in gptq; and `refits`, each of which takes the tables
to the least squares of tr(D H DT) given all codes (conjugate gradients), kept for the rows whose loss falls, and then
each column's codes to their best value given all others. The loss on the calibration text never rises.

Paper: SqueezeLLM, Kim et al. 2024, arXiv 2306.07629 (k-means); GPTQ, Frantar et al. 2023, arXiv 2210.17323 (sweep).
Cost: out * in * log(in) for k-means; for the sweep out * in^2 multiply-adds and in^3 / 3 for the factor; about ten
times out * in^2, in float64, for each refit. Limits: the tables count: 2^b levels of 16 bits for n weights add
16 * 2^b / n bits to each; decoding is a look-up, no kernel multiplies with such codes. Fisher weights need a backward
pass over the whole model.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import levels, obs
from lilliput.formats import groups
from lilliput.formats.codebook import Table, from_target
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

_WEIGHTS = 1 << 20  # swept together


class Options(Strict):
    """See the module's docstring."""

    weigh: Literal["none", "gram", "pivot", "fisher"] = Field(
        "pivot", description="weight of an error in k-means: 1, the input's mean square, 1 / U_jj^2, or the Fisher one"
    )
    sweep: bool = Field(True, description="choose codes by GPTQ's sweep; false takes the nearest levels")
    refits: int = Field(1, ge=0, le=50, description="passes of descent over tables and codes after the sweep")
    damping: float = Field(0.01, ge=0.0, le=10.0, description="added to the Gram diagonal, as a share of its mean")
    shrinkage: float = Field(
        0.2, ge=0.0, le=10.0, description="added to each Gram diagonal entry, as a share of itself; 0 is GPTQ's"
    )
    block: int = Field(obs.BLOCK, ge=1, description="columns between two large products; changes speed only")
    fisher_samples: int | None = Field(
        None, ge=1, description="calibration samples for the Fisher statistic; none: all"
    )


def needs(o: Options) -> tuple[str, ...]:
    """The Gram matrix for a sweep and its pivots, and what the weights of k-means are made of."""
    gram = ("gram",) if o.sweep or o.weigh == "pivot" else ("square",) if o.weigh == "gram" else ()
    return (*gram, "fisher") if o.weigh == "fisher" else gram


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes for the remainder after the layer's parts; outside the support they decode to 0.

    Raises PlanError without bits in the target, LilliputError for a weight, Gram matrix or Fisher information that is
    not finite.
    """
    form = from_target(target)
    weight = layer.rest()
    holes = None if layer.support is None else ~layer.support
    supported = weight if holes is None else weight.masked_fill(holes, 0.0)
    order, factor = None, None
    if o.sweep or o.weigh == "pivot":
        gram = stats.need("gram")
        order = gram.diagonal().argsort(descending=True, stable=True)
        factor = obs.factorize(gram, o.damping, order, o.shrinkage)
    importance: Tensor | None = None
    if o.weigh == "fisher":
        importance = layer.need_fisher()
    elif o.weigh == "gram" and stats.count:
        importance = stats.second_moment()
    elif factor is not None and order is not None and o.weigh == "pivot":
        square = factor.pivot.square()
        importance = torch.empty_like(square).index_copy_(0, order, square)
    if importance is not None and holes is not None:
        importance = importance.expand(weight.shape).masked_fill(holes, 0.0)
    table = form.fit(supported, importance=importance, zero=holes)
    if not o.sweep or factor is None:
        return layer.with_part(QuantizedPart(form, form.encode(supported, table), table))
    rows, width = weight.shape
    group = groups.index(width, form.group_size, weight.device)
    refits = o.refits if form.group_size != 0 else 0
    codes = torch.empty(rows, width, dtype=torch.int8, device=weight.device)
    fitted = table.levels.clone()
    step = max(1, _WEIGHTS // max(width, 1))
    for a in range(0, rows, step):
        b = min(a + step, rows)
        support = None if layer.support is None else layer.support[a:b]
        problem = levels.Problem(weight[a:b], stats.need("gram"), factor, order, o.shrinkage, support, o.block)
        start = table.rows(a, b).levels.float().expand(b - a, -1, -1)
        values, refitted = levels.sweep(problem, start, group, form.dtype, refits)
        part = Table(refitted.to(form.dtype)) if form.group_size else table
        if form.group_size:
            fitted[a:b] = part.levels
        codes[a:b] = form.encode(values, part)
    return layer.with_part(QuantizedPart(form, codes, Table(fitted)))


METHOD = Compress(
    paper="Kim et al. 2024, arXiv 2306.07629",
    options=Options,
    needs=("gram", "square", "fisher"),
    reads=needs,
    fisher_samples=lambda o: o.fisher_samples,
    writes="quantized",
    formats=("codebook",),
    baseline="rtn",
    covers={
        "codebook": [{"method": "codebook", "target": {"format": "codebook", "bits": 4, "group_size": "channel"}}],
        "nonuniform-codebook": [
            {
                "method": "codebook",
                "target": {"format": "codebook", "bits": 4, "group_size": "channel"},
                "options": {"weigh": "none", "sweep": False},
            }
        ],
    },
    run=compress,
    rowwise=True,
    scratch=(2 * 10 * 8 + 64) * levels.ROOM,  # a refit and k-means (measured)
)
