"""GPTQ: quantize input after input, each error pushed onto the inputs that are still free.

Minimises |X WT - X WhatT|^2 = tr(D H DT), D = W - What, H = XT X + damping * mean(diag) * I. With H^-1 = UT U (U upper
triangular), column by column: q = Q(w_j), e = (w_j - q) / U_jj, w_k -= e U_jk for all k > j; so that D = E U and the
loss is |E|^2. The order is by decreasing diag(H); scales are fitted before on the original weight (static groups), so
groups stay contiguous; Q may round to any levels with fixed scales (`formats.levels`, `nested`) and to real zero points
(`formats.affine`). `algebra.obs` states the equal form that is computed.

Beyond the paper, without gradients: `shrinkage` adds to each H_jj a share of itself, so that correlations which a short
calibration text only seems to show move no weights (damping, a share of the mean, does this to weak inputs only); the
ranges of the groups are searched under an importance-weighted error; and `refine` passes take each group's scale to its
least-squares value given all codes, and each column's codes to their best value given all others (cyclic coordinate
descent): the loss on the calibration text never rises.

Paper: Frantar et al. 2023, arXiv 2210.17323; LDLQ: Chee et al. 2023, arXiv 2307.13304.
Cost: out * in^2 multiply-adds for the sweep, twice that for each refining pass, in^3 / 3 for the factor. Memory: two
matrices [in, in] beside the Gram matrix. Limits: H describes the calibration text; with fewer tokens than inputs the
damping decides.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import lattice, obs
from lilliput.errors import PlanError
from lilliput.formats import ranged, swept
from lilliput.formats.groups import index
from lilliput.formats.integer import IntegerFormat, IntegerGrid
from lilliput.formats.known import from_target
from lilliput.formats.swept import Sweepable, Swept
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import Scheme, quantized
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

_ROWS = 2048  # outputs swept together: their working matrices stay small and one block of them in cache


class Options(Strict):
    """See the module's docstring; the defaults lower the loss at little cost."""

    act_order: bool = Field(True, description="quantize inputs by decreasing mean square; scales are fitted before")
    static_groups: bool = Field(True, description="only without act_order: false fits each group on the updated weight")
    damping: float = Field(0.01, ge=0.0, le=10.0, description="added to the Gram diagonal, as a share of its mean")
    shrinkage: float = Field(
        0.2, ge=0.0, le=10.0, description="added to each Gram diagonal entry, as a share of itself; 0 is the paper's"
    )
    block: int = Field(obs.BLOCK, ge=1, description="columns between two large products; changes speed only")
    search: Literal["minmax", "mse"] = Field(
        "mse", description="range of a group: min-max, or the range of least error"
    )
    importance: Literal["none", "gram", "pivot"] = Field(
        "gram", description="weight of input j in the search: 1, H_jj, or 1 / U_jj^2"
    )
    steps: int = Field(30, ge=1, le=200, description="shrink factors that the search tries")
    norm: float = Field(2.0, ge=1.0, le=4.0, description="exponent of the error in the search")
    signed_scale: bool = Field(
        False, description="allow negative symmetric scales, so that the extra code can be on either side"
    )
    refine: int = Field(0, ge=0, le=50, description="passes of coordinate descent over scales and codes")
    rescale: bool = Field(True, description="refining passes also move the scales (not a scale per tensor)")


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """One part on the target's grid. Raises PlanError for options that the grid does not have."""
    form = swept.check(from_target(target))
    ranged.check(form, _search(o))
    if not o.act_order and not o.static_groups and not isinstance(form, IntegerFormat):
        raise PlanError(
            f"static_groups: false fits each group within the sweep, which {form.describe()} cannot do: only integers "
            "with plain float scales can; leave it out"
        )
    return quantized(form)


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes for the remainder after the layer's parts; outside the support they decode to 0.

    Raises PlanError without bits in the target, LilliputError for a weight or Gram matrix that is not finite.
    """
    return rounded(layer, stats, swept.check(from_target(target)), o)


def rounded(layer: Layer, stats: SiteStats, form: Sweepable, o: Options, grid: Any = None) -> Layer:
    """`compress` on a format; `grid`: scales of the caller's, in the format's own form, in place of fitted ones."""
    weight = layer.rest()
    gram = stats.need("gram")
    supported = weight if layer.support is None else torch.where(layer.support, weight, 0.0)
    order = gram.diagonal().argsort(descending=True, stable=True) if o.act_order else None
    factor = obs.factorize(gram, o.damping, order, o.shrinkage)
    importance = _importance(gram, factor, order, o)
    if grid is None:
        grid = ranged.fit(form, supported, importance, _search(o))
    work = swept.start(form, grid)
    rows, width = weight.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=weight.device)
    for a in range(0, rows, _ROWS):
        b = min(a + _ROWS, rows)
        support = None if layer.support is None else layer.support[a:b]
        codes[a:b] = _sweep(weight[a:b], support, gram, factor, order, importance, work.rows(a, b), o)
    return layer.with_part(QuantizedPart(form, codes, swept.finish(work, grid)))


def _search(o: Options) -> ranged.RangeRule:
    return ranged.RangeRule(o.search, o.steps, o.norm, o.signed_scale)


def _importance(gram: Tensor, factor: obs.Factor, order: Tensor | None, o: Options) -> Tensor | None:
    if o.importance == "none" or o.search == "minmax":
        return None
    if o.importance == "gram":
        diagonal = gram.diagonal()
        return diagonal + o.damping * diagonal.mean()
    square = factor.pivot.square()
    return square if order is None else torch.empty_like(square).index_copy_(0, order, square)


def _sweep(
    weight: Tensor,
    support: Tensor | None,
    gram: Tensor,
    factor: obs.Factor,
    order: Tensor | None,
    importance: Tensor | None,
    work: Swept,
    o: Options,
) -> Tensor:
    """Codes int8 [rows, in] of some rows; refitted scales and zeros are written into the grid of `work`."""
    rows, width = weight.shape
    form, grid = work.form, work.grid
    groups = index(width, form.group_size).tolist()
    columns = weight.T.contiguous() if order is None else weight.T[order]
    kept_mask = None if support is None else support.T.contiguous()
    mask = kept_mask if kept_mask is None or order is None else kept_mask[order]
    visits = groups if order is None else [groups[j] for j in order.tolist()]
    rounding = work.rounding(rows, visits)
    deviation, codes = torch.empty_like(columns), torch.empty_like(columns)
    dynamic = order is None and not o.static_groups and form.group_size != 0
    for a, b in _blocks(groups if dynamic else None, width, o.block):
        if dynamic and isinstance(form, IntegerFormat) and (a == 0 or groups[a] != groups[a - 1]):
            stop = next((j for j in range(a, width) if groups[j] != groups[a]), width)
            values = obs.reach(columns, deviation, factor, a, stop)
            values = values if mask is None else values * mask[a:stop]
            _refit(values, None if importance is None else importance[a:stop], form, grid, groups[a], o)
            rounding = work.rounding(rows, visits)
        aim = obs.reach(columns, deviation, factor, a, b)
        some = None if mask is None else mask[a:b]
        obs.settle(aim, deviation[a:b], columns[a:b], factor.coupling[a:b, a:b], a, rounding, codes[a:b], some)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
        deviation = torch.empty_like(deviation).index_copy_(0, order, deviation)
        rounding = work.rounding(rows, groups)
    if o.refine:
        gram = gram.clone()
        gram.diagonal().mul_(1.0 + o.shrinkage)
        ridge = factor.damping * float(gram.diagonal().mean()) / (1.0 + o.shrinkage)
        dtype = work.moves if o.rescale else None
        for _ in range(o.refine):
            lattice.polish(codes, deviation, gram, ridge, rounding, dtype, kept_mask)
        if dtype is not None:
            grid.scale.copy_(torch.stack(list(rounding.scale), 1))
    return work.codes(codes, groups)


def _blocks(groups: list[int] | None, width: int, block: int) -> list[tuple[int, int]]:
    """Columns cut every `block`, and wherever a group starts if `groups` is given."""
    cuts = set(range(0, width, block))
    if groups is not None:
        cuts |= {j for j in range(1, width) if groups[j] != groups[j - 1]}
    ordered = [*sorted(cuts), width]
    return list(itertools.pairwise(ordered))


def _refit(
    values: Tensor, importance: Tensor | None, form: IntegerFormat, grid: IntegerGrid, group: int, o: Options
) -> None:
    """Fit one group's scale and zero on what its columns should become, [columns, rows]; written into `grid`."""
    unit = IntegerFormat(form.bits, form.symmetric, -1, form.scale_dtype)
    fitted = ranged.fit(unit, values.T.contiguous(), importance, _search(o))
    grid.scale[:, group] = fitted.scale[:, 0]
    if grid.zero is not None and fitted.zero is not None:
        grid.zero[:, group] = fitted.zero[:, 0]


METHOD = Compress(
    paper="Frantar et al. 2023, arXiv 2210.17323",
    options=Options,
    needs=("gram",),
    writes="quantized",
    formats=swept.NAMES,
    baseline="rtn",
    covers={
        "gptq": [{"method": "gptq", "target": {"bits": 4}}],
        "ldlq": [{"method": "gptq", "target": {"bits": 4}, "options": {"act_order": False}}],
    },
    run=compress,
    scheme=scheme,
    rowwise=True,
)
