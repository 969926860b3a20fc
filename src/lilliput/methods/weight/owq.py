"""OWQ: the few inputs that a grid hurts most stay in float16, all others go through GPTQ.

The sensitivity of input j is H_jj |W_j - Q(W_j)|^2, H = XT X and Q rounding to nearest. The k most sensitive columns
are kept. Ranges are searched for the other columns alone; in the sweep the kept columns come last, so that they take up
the errors of all others and pass on none; they are stored in float16. The grid holds 0 at their places.

k = floor(extra * out * in / (16 out + 32)): what `extra` bits a weight pay for, a kept column being `out` values and
its number. k = 0 is `gptq`, k = in the weight in float16.

Paper: Lee et al. 2023, arXiv 2306.02272.
Cost: that of gptq and one rounding to nearest. Limits: pays where few inputs are far stronger than the rest, as in
models of several billion parameters; the kept columns' codes stay in the file.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from lilliput.algebra import obs, values
from lilliput.errors import LilliputError, PlanError
from lilliput.formats.integer import from_target
from lilliput.parts.columns import ColumnsPart, ColumnsSpec
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress


class Options(Strict):
    """See the module's docstring."""

    extra: float = Field(
        0.1, ge=0.0, le=16.0, description="bits a weight to spend on kept columns, rounded down to whole columns"
    )
    columns: int | None = Field(None, ge=0, description="number of kept columns, in place of `extra`")
    act_order: bool = Field(True, description="quantize inputs by decreasing mean square; kept ones come last anyway")
    damping: float = Field(0.01, ge=0.0, le=10.0, description="added to the Gram diagonal, as a share of its mean")
    shrinkage: float = Field(
        0.2, ge=0.0, le=10.0, description="added to each Gram diagonal entry, as a share of itself; 0 is the paper's"
    )
    search: Literal["minmax", "mse"] = Field(
        "mse", description="range of a group: min-max, or the range of least error"
    )
    importance: bool = Field(True, description="in the search, weight input j by its mean square; the paper does not")


def column_count(o: Options, rows: int, width: int) -> int:
    """The number of kept columns. Raises PlanError for more than there are."""
    if o.columns is None:
        return min(width, int(o.extra * rows * width / ColumnsSpec(1).size_bits(rows, width)))
    if o.columns > width:
        raise PlanError(f"'owq' cannot keep {o.columns} of {width} columns: set owq.columns to {width} or less")
    return o.columns


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """Codes and the kept columns. Raises PlanError for more columns than there are."""
    return Scheme((QuantizedSpec(from_target(target)), ColumnsSpec(column_count(o, rows, width))))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes and kept columns for the remainder after the layer's parts, both 0 outside the support.

    Raises PlanError without bits in the target, LilliputError for a weight or Gram matrix that is not finite.
    """
    form = from_target(target)
    weight, gram = layer.rest(), stats.need("gram")
    rows, width = weight.shape
    supported = weight if layer.support is None else torch.where(layer.support, weight, 0.0)
    diagonal = gram.diagonal()
    importance = diagonal + o.damping * diagonal.mean()
    weigh = importance if o.search == "mse" and o.importance else None
    plain = form.fit(supported, search=o.search, importance=weigh)
    miss = (form.decode(form.encode(supported, plain), plain) - supported).square().sum(0)
    top = (miss * diagonal).argsort(descending=True, stable=True)[: column_count(o, rows, width)]
    chosen = torch.zeros(width, dtype=torch.bool, device=weight.device)
    chosen[top] = True

    start = -diagonal if o.act_order else torch.arange(width, device=weight.device).float()
    order = torch.where(chosen, torch.inf, start).argsort(stable=True)
    factor = obs.factorize(gram, o.damping, order, o.shrinkage)
    rest = torch.where(chosen, 0.0, supported)
    counted = torch.ones_like(diagonal) if weigh is None and o.search == "mse" else weigh
    grid = form.fit(rest, search=o.search, importance=None if counted is None else torch.where(chosen, 0.0, counted))
    visits = form.group_of(width)[order.cpu()].tolist()

    def rounding(a: int, b: int) -> obs.Nearest:
        part = grid.rows(a, b)
        inner = obs.Rounding.of(part.scale, part.zero, form.bits, b - a, visits)
        return values.Kept.of(inner, chosen[order].unsqueeze(1).expand(width, b - a))

    rounded = values.sweep(weight, factor, order, rounding, support=layer.support)
    dense = QuantizedPart(form, form.encode(torch.where(chosen, 0.0, rounded), grid), grid)
    columns = chosen.nonzero().squeeze(1)
    exact = (rounded - dense.decode())[:, columns]
    if not bool(torch.isfinite(exact.half()).all()):
        raise LilliputError(f"{layer.name} contains weights beyond float16, in which 'owq' keeps columns: leave it out")
    return layer.with_part(dense, ColumnsPart(exact, columns, width))


METHOD = Compress(
    paper="Lee et al. 2023, arXiv 2306.02272",
    options=Options,
    needs=("gram",),
    writes="parts",
    formats=("int",),
    baseline="rtn",
    covers={
        "owq": [{"method": "owq", "target": {"bits": 3, "group_size": "channel", "symmetric": False}}],
    },
    run=compress,
    scheme=scheme,
    rowwise=False,  # the kept columns of a matrix are chosen for all of its rows
)
