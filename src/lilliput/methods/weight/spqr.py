"""SpQR: GPTQ in tiny groups, with the weights that a grid serves worst kept exactly.

A share of all weights is kept as a sparse part in float16; the plan has to know their number, so the share stands in
for the paper's threshold, which is then whatever the last kept weight scores. With H^-1 = UT U:

1. Screening: the gain of leaving weight i out of its group is
   sum_j (w_j - Q(w_j))^2 / U_jj^2 - sum_{j != i} (w_j - Q_i(w_j))^2 / U_jj^2, where Q_i is the grid fitted without i.
   A grid covers its range, so only the two ends of a group are tried; for all others it is their own error. The share
   of the highest gains is put aside, and the grids are fitted without them.
2. A GPTQ sweep that leaves these exact shows the error of all others, ((w_j - q_j) / U_jj)^2 at their turn. Of gains
   and errors together the highest are kept; grids are fitted again, a kept weight standing as the mean of its group.
3. The final sweep leaves the kept weights what they have become by then and pushes no error of theirs; they are stored
   in float16. The grid holds 0 at their places, so they are reproduced bit by bit.

The paper's groups of 16 hold scales and zero points of 3 bits themselves: scale_dtype int3/16. The choice of outliers,
steps 1 and 2, goes by plain scales and coarsely searched ranges; only the final grid and sweep have the target's.

Beyond the paper: ranges are searched and correlations shrunk, as in `gptq`. Without outliers it is `gptq` with these
groups.

Paper: Dettmers et al. 2023, arXiv 2306.03078.
Cost: twice the sweep of gptq and about five times its search of ranges. Memory: ten matrices [out, in]. Limits: each
kept weight takes 32 bits besides its code; a group of 16 with plain float16 scales takes one bit a weight, with
scales of 3 bits 0.6.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import obs, values
from lilliput.errors import LilliputError, PlanError
from lilliput.formats import groups, ranged, swept
from lilliput.formats.integer import IntegerFormat, IntegerGrid
from lilliput.formats.nested import NestedFormat, from_target
from lilliput.parts import sparse
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.parts.sparse import SparseSpec
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

_SCREEN = 9  # shares of the range that are looked among to choose outliers; finer ones save 0.3 % of the error


class Options(Strict):
    """See the module's docstring."""

    share: float = Field(0.01, ge=0.0, le=1.0, description="share of all weights kept exactly; fixes the size")
    act_order: bool = Field(True, description="quantize inputs by decreasing mean square")
    damping: float = Field(0.01, ge=0.0, le=10.0, description="added to the Gram diagonal, as a share of its mean")
    shrinkage: float = Field(
        0.2, ge=0.0, le=10.0, description="added to each Gram diagonal entry, as a share of itself; 0 is the paper's"
    )
    search: Literal["minmax", "mse"] = Field(
        "mse", description="range of a group: min-max, or the range of least error"
    )


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """Codes and the share. Raises PlanError for a grid per tensor, whose groups cannot be screened."""
    form = from_target(target)
    if form.group_size == 0:
        raise PlanError("'spqr' screens groups: set target.group_size to a number such as 16, or to 'channel'")
    return Scheme((QuantizedSpec(form), SparseSpec(o.share)))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes and outliers for the remainder after the layer's parts, both 0 outside the support.

    Raises PlanError without bits in the target, LilliputError for a weight or Gram matrix that is not finite.
    """
    form = from_target(target)
    weight, gram = layer.rest(), stats.need("gram")
    supported = weight if layer.support is None else torch.where(layer.support, weight, 0.0)
    order = gram.diagonal().argsort(descending=True, stable=True) if o.act_order else None
    factor = obs.factorize(gram, o.damping, order, o.shrinkage)
    pivot = factor.pivot if order is None else torch.empty_like(factor.pivot).index_copy_(0, order, factor.pivot)
    importance = gram.diagonal() + o.damping * gram.diagonal().mean()

    def sweep(form: IntegerFormat | NestedFormat, grid: Any, mask: Tensor, targets: Tensor | None = None) -> Tensor:
        work = swept.start(form, grid)
        index = groups.index(weight.shape[1], form.group_size)
        visits = (index if order is None else index[order.cpu()]).tolist()

        def rounding(a: int, b: int) -> obs.Nearest:
            exact = mask[a:b].T if order is None else mask[a:b].T[order]
            return values.Kept.of(work.rows(a, b).rounding(b - a, visits), exact)

        return values.sweep(weight, factor, order, rounding, support=layer.support, targets=targets)

    mask = torch.zeros_like(supported, dtype=torch.bool)
    if SparseSpec(o.share).count(*weight.shape):
        plain = form if isinstance(form, IntegerFormat) else form.codes
        gain = _gain(plain, supported, importance, pivot.square(), o)
        mask = sparse.highest(gain, o.share)
        aim = torch.empty_like(supported)
        rounded = sweep(plain, _coarse(plain, supported, importance, mask, o), mask, aim)
        score = torch.where(mask, gain, aim.sub_(rounded).mul_(pivot).square_())
        mask = sparse.highest(score if layer.support is None else score * layer.support, o.share)
    grid = _fit(form, supported, importance, mask, o)
    rounded = sweep(form, grid, mask)
    codes = form.encode(torch.where(mask, 0.0, rounded), grid)
    dense = QuantizedPart(form, codes, grid)
    outliers = sparse.pick(rounded - dense.decode(), mask, o.share)
    if not bool(torch.isfinite(outliers.values.half()).all()):
        raise LilliputError(
            f"{layer.name} contains weights beyond float16, in which 'spqr' keeps outliers: leave it out"
        )
    return layer.with_part(dense, outliers)


def _fit(form: IntegerFormat | NestedFormat, weight: Tensor, importance: Tensor, mask: Tensor, o: Options) -> Any:
    """The grid of all weights but those of `mask`."""
    filled, weigh = _rest(form, weight, importance, mask, o)
    return ranged.fit(form, filled, weigh, ranged.RangeRule(o.search))


def _coarse(form: IntegerFormat, weight: Tensor, importance: Tensor, mask: Tensor, o: Options) -> IntegerGrid:
    """The same, from a search that is good enough to tell outliers."""
    filled, weigh = _rest(form, weight, importance, mask, o)
    return form.fit(filled, search=o.search, importance=weigh, steps=_SCREEN, polish=False)


def _rest(
    form: IntegerFormat | NestedFormat, weight: Tensor, importance: Tensor, mask: Tensor, o: Options
) -> tuple[Tensor, Tensor | None]:
    """Weights and, where ranges are searched, importance in which those of `mask` stand as the mean of the others in
    their group and count nothing."""
    searched = o.search == "mse"
    if not bool(mask.any()):
        return weight, importance if searched else None
    rows, width = weight.shape
    index = groups.index(width, form.group_size, weight.device).expand(rows, width)
    stay = (~mask).float()
    units = weight.new_zeros(groups.units(rows, width, form.group_size))
    total, count = units.scatter_add(1, index, weight * stay), units.scatter_add(1, index, stay)
    means = (total / count.clamp(min=1)).gather(1, index)
    return torch.where(mask, means, weight), importance * stay if searched else None


def _gain(form: IntegerFormat, weight: Tensor, importance: Tensor, curve: Tensor, o: Options) -> Tensor:
    """By how much the error of each weight's group falls if it is left out, [out, in]; `curve` [in] is 1 / U_jj^2."""
    rows, width = weight.shape
    index = form.group_of(width, weight.device).expand(rows, width)

    def error(without: Tensor) -> Tensor:
        grid = _coarse(form, weight, importance, without, o)
        return (form.decode(form.encode(weight, grid), grid) - weight).square() * curve

    def by_unit(x: Tensor) -> Tensor:
        return x.new_zeros(rows, form.groups(width)).scatter_add_(1, index, x)

    own = error(torch.zeros_like(weight, dtype=torch.bool))
    gain, before = own.clone(), by_unit(own)
    for sign in (1.0, -1.0):
        end = _first_highest(weight * sign, index, form.groups(width))
        without = by_unit(error(end) * ~end)
        gain = torch.where(end, torch.maximum(gain, (before - without).gather(1, index)), gain)
    return gain


def _first_highest(x: Tensor, index: Tensor, groups: int) -> Tensor:
    """Mask of the first highest value of each row's groups, [out, in]."""
    rows, width = x.shape
    top = x.new_full((rows, groups), -torch.inf).scatter_reduce_(1, index, x, "amax").gather(1, index)
    place = torch.where(x == top, torch.arange(width, device=x.device), width)
    first = torch.full((rows, groups), width, device=x.device).scatter_reduce_(1, index, place, "amin")
    return place == first.gather(1, index)


METHOD = Compress(
    paper="Dettmers et al. 2023, arXiv 2306.03078",
    options=Options,
    needs=("gram",),
    writes="parts",
    formats=("int",),
    baseline="rtn",
    covers={
        "spqr": [
            {"method": "spqr", "target": {"bits": 3, "group_size": 16, "symmetric": False, "scale_dtype": "int3/16"}}
        ],
    },
    run=compress,
    scheme=scheme,
    rowwise=False,  # the outliers of a matrix are chosen together
    scratch=16 << 20,  # bytes beside what the plan counts for a sweep (measured)
)
