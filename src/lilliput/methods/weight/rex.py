"""REx: the weight as a sum of K quantized terms, each of what the terms before it leave over.

What^(0) = 0, What^(k) = What^(k-1) + Q(W - What^(k-1)). Every term rounds to nearest on a grid of its own, so the
largest error falls by about 2^(b-1) - 1 a term. Sparse variant: with `share` < 1 the terms after the first are held for
the round(share * out) outputs whose rest |W_i - What_i| is largest at that term, weighted by the inputs' mean square
where `importance` is set; the paper is data-free.

Paper: Yvinec et al. 2022, REx, arXiv 2203.14645.
Cost: K times rounding to nearest. Limits: each further term costs as many bits as the first (times the share); one term
of twice the bits is as exact and stores fewer scales.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from lilliput.algebra.masks import largest
from lilliput.formats.integer import from_target
from lilliput.parts.layer import Layer
from lilliput.parts.part import PartSpec
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.rows import RowsPart, RowsSpec
from lilliput.parts.scheme import Scheme
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

NEEDS = ("square",)


class Options(Strict):
    """See the module's docstring."""

    terms: int = Field(2, ge=1, le=8, description="quantized terms; 1 is round to nearest")
    share: float = Field(1.0, ge=0.0, le=1.0, description="share of the outputs with terms after the first")
    search: Literal["minmax", "mse"] = Field(
        "mse", description="range of a group: min-max, or the range of least error"
    )
    importance: bool = Field(True, description="weight input j by its mean square")


def needs(o: Options) -> tuple[str, ...]:
    """Data-free without importance."""
    return NEEDS if o.importance else ()


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """The terms, the later ones of some rows."""
    term = QuantizedSpec(from_target(target))
    later: PartSpec = term if o.share == 1.0 else RowsSpec(_count(rows, o), term)
    return Scheme((term, *[later] * (o.terms - 1)))


def _count(rows: int, o: Options) -> int:
    """Outputs that have the later terms."""
    return round(o.share * rows)


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Terms for the remainder after the layer's parts, all 0 outside the support. Raises PlanError without bits."""
    form = from_target(target)
    importance = stats.second_moment() if o.importance and stats.count else None
    out = layer
    for term in range(o.terms):
        rest = out.rest() if layer.support is None else torch.where(layer.support, out.rest(), 0.0)
        index = None
        if term and o.share < 1.0:
            missed = rest.square() if importance is None else rest.square() * importance
            index = largest(missed.sum(1).unsqueeze(0), _count(len(rest), o))[0].nonzero().squeeze(1)
            rest = rest[index]
        grid = form.fit(rest, search=o.search, importance=importance)
        part = QuantizedPart(form, form.encode(rest, grid), grid)
        out = out.with_part(part if index is None else RowsPart(part, index, len(layer.weight)))
    return out


METHOD = Compress(
    paper="Yvinec et al. 2022, arXiv 2203.14645",
    options=Options,
    needs=NEEDS,
    reads=needs,
    writes="parts",
    formats=("int",),
    baseline="rtn",
    covers={
        "rex": [{"method": "rex", "target": {"bits": 4}, "options": {"terms": 2, "share": 0.25}}],
    },
    run=compress,
    scheme=scheme,
    rowwise=False,  # the outputs that keep their rest are chosen among those of one matrix
)
