"""LoftQ: codes and a low-rank product fitted to each other in turns, the start of a fine-tuning of the product.

P_0 = 0; for t = 1 .. T: Q_t = quantize(W - P_(t-1)), P_t = the best product of rank r for W - Q_t. The pair of least
error of all turns is kept, so that more turns are never worse; T = 1 is the SVD of the quantization error. T = 0 is the
start of QLoRA: Q = quantize(W), and P = B A with B = 0 and A drawn from N(0, 1/in), so that training begins at the
quantized model.

Extensions: with `weighting` gram, the default, the error is the outputs', tr(D G DT), and the product is EoRA's; none
is the paper's. `solver` gptq also quantizes under that error. The error of turns is measured on the
factors as they are stored.

Paper: Li et al. 2023, arXiv 2310.08659; QLoRA: Dettmers et al. 2023, arXiv 2305.14314.
Cost: T times a quantization and an eigendecomposition of the smaller side. Stored: codes and r (out + in) numbers.
Limits: the error of nf4 or integers is spread over many directions, of which r are repaired.
"""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import lowrank
from lilliput.errors import PlanError
from lilliput.formats import ranged, swept
from lilliput.formats.known import from_target
from lilliput.formats.ranged import RangeRule
from lilliput.methods.weight import gptq
from lilliput.methods.weight.eora import rank_of
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import Factors, LowRankPart, LowRankSpec, approximate, as_part, factor_spec, rest_of
from lilliput.parts.part import Part
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

NEEDS = ("gram",)


class Options(Strict):
    """See the module's docstring."""

    turns: int = Field(5, ge=0, le=100, description="how often codes and product are fitted; 0 leaves the product 0")
    weighting: Literal["none", "gram"] = Field(
        "gram", description="the error to minimise: of the weights, as in the paper, or of the outputs"
    )
    solver: Literal["nearest", "gptq"] = Field("nearest", description="how the codes are found")
    factors: Factors = Field("float16", description="how the factors are stored")
    seed: int = Field(0, ge=0, description="of the random factor when turns is 0")


def needs(o: Options) -> tuple[str, ...]:
    """Weights alone are fitted without calibration."""
    return NEEDS if o.weighting == "gram" or o.solver == "gptq" else ()


def scheme(target: Target, options: Options, rows: int, width: int) -> Scheme:
    """Codes of the target's format, and a product of two factors.

    Raises PlanError for a format or rank that cannot be.
    """
    if options.solver == "gptq" and target.format not in swept.NAMES:
        raise PlanError(f"solver gptq has no format '{target.format}': use solver nearest")
    factor = factor_spec(options.factors)
    return Scheme(
        (QuantizedSpec(from_target(target)), LowRankSpec(rank_of(target, rows, width), factor, factor)),
    )


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with codes and a product. Raises LilliputError for values that are not finite, and if it is pruned."""
    weight = rest_of(layer)
    rank = rank_of(target, *weight.shape)
    metric = stats.need("gram") if o.weighting == "gram" and stats.count else None
    if o.turns == 0:
        return layer.with_part(_codes(layer.name, weight, stats, target, o), _untrained(layer.name, weight, rank, o))
    product, least = torch.zeros_like(weight), float("inf")
    best: tuple[Part, ...] = ()
    root = lowrank.root_of(weight, metric)
    for _ in range(o.turns):
        codes = _codes(layer.name, weight - product, stats, target, o)
        rest = weight - codes.decode()
        part = approximate(rest, rank, factor_spec(o.factors), metric, root=root)
        product = part.decode()
        error = lowrank.squared(rest - product, metric)
        if error < least:
            least, best = error, (codes, part)
    return layer.with_part(*best)


def _codes(name: str, weight: Tensor, stats: SiteStats, target: Target, o: Options) -> Part:
    if o.solver == "gptq":
        return gptq.compress(Layer(name, weight), stats, target, gptq.Options()).parts[0]
    form = from_target(target)
    importance = stats.need("gram").diagonal() if o.weighting == "gram" and stats.count else None
    # The paper's grids cover the range; errors that count differently are looked for.
    grid = ranged.fit(form, weight, importance, RangeRule("minmax" if importance is None else "mse"))
    return QuantizedPart(form, form.encode(weight, grid), grid)


def _untrained(name: str, weight: Tensor, rank: int, o: Options) -> LowRankPart:
    """B = 0 and a random A: linears of equal shape draw different ones, and the same in every run."""
    rows, width = weight.shape
    generator = torch.Generator().manual_seed(o.seed + zlib.crc32(name.encode()))
    right = torch.randn(rank, width, generator=generator) / width**0.5
    spec = factor_spec(o.factors)
    return LowRankPart(as_part(weight.new_zeros(rows, rank), spec), as_part(right.to(weight.device), spec))


METHOD = Compress(
    paper="Li et al. 2023, arXiv 2310.08659",
    options=Options,
    needs=NEEDS,
    reads=needs,
    writes="parts",
    default={"bits": 4, "rank": 16},
    baseline="rtn",
    covers={
        "loftq": [{"method": "loftq", "target": {"bits": 4, "rank": 16}}],
    },
    run=compress,
    scheme=scheme,
    masked=False,
    double=True,
)
