"""LPLR: both factors of a low-rank product in few bits, the second fitted to the first as it was quantized.

S ~ N(0, 1/m) [in, m]; A = Q_left(W S) [out, m]; B = Q_right(argmin_B |A B - W|) [m, in]; What = A B. With `basis`
singular the columns of W S give way to the first m left singular vectors (LSVD). m is the target's rank, or the largest
whose factors, scales included, fit into `budget` bits for each weight, at most min(out, in).

A factor of b bits is a symmetric integer grid with one half-precision scale for each of its rows, on the range of least
squared error; float32 stands for unlimited bits. The paper's variants with dither and with a scale for each column are
left out.

Paper: Saha et al. 2023, arXiv 2310.11028 (Matrix compression via randomized low rank and low precision factorization).
Cost: out * in * m for sketch and fit, m^2 * out for the least squares; `singular` adds an eigendecomposition. No data.
Limits: spectra of language models decay slowly, so that few directions lose much; compare with plain integers of equal
bits.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from lilliput.algebra import lowrank
from lilliput.errors import LilliputError, PlanError
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import Factors, LowRankPart, LowRankSpec, as_part, factor_spec, rest_of
from lilliput.parts.scheme import Scheme
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress


class Options(Strict):
    """See the module's docstring."""

    basis: Literal["sketch", "singular"] = Field(
        "sketch", description="columns of A: random mixtures, or singular vectors"
    )
    left: Factors = Field("int8", description="how A is stored")
    right: Factors = Field("int8", description="how B is stored")
    budget: float = Field(6.0, gt=0.0, le=64.0, description="bits for each weight, scales included; target.rank wins")
    seed: int = Field(0, ge=0, description="of the sketch")


def rank_of(target: Target, o: Options, rows: int, width: int) -> int:
    """The target's rank, or the largest within the budget.

    Raises PlanError for a rank that the matrix cannot have, and for a budget that does not reach for rank 1.
    """
    most = min(rows, width)
    if target.rank is not None:
        return lowrank.checked(target.rank, rows, width)
    one, two = (_spec(o, rank).size_bits(rows, width) for rank in (1, 2))
    rank = min(most, 1 + int((o.budget * rows * width - one) // (two - one)))
    if rank < 1:
        least = math.ceil(100 * one / (rows * width)) / 100
        raise PlanError(
            f"{o.budget} bits for each weight of a [{rows}, {width}] linear do not suffice for rank 1: give {least}"
        )
    return rank


def _spec(o: Options, rank: int) -> LowRankSpec:
    return LowRankSpec(rank, factor_spec(o.left), factor_spec(o.right))


def scheme(target: Target, options: Options, rows: int, width: int) -> Scheme:
    """A product of two factors. Raises PlanError; see `rank_of`."""
    return Scheme((_spec(options, rank_of(target, options, rows, width)),))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with one part. Raises LilliputError for a weight that is not finite, and for a pruned layer."""
    weight = rest_of(layer)
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise LilliputError(f"the weight contains {bad} values that are NaN or infinite: it cannot be factored")
    rows, width = weight.shape
    rank = rank_of(target, o, rows, width)
    if o.basis == "singular":
        columns = lowrank.spectrum(weight).basis[:, :rank]
    else:
        generator = torch.Generator().manual_seed(o.seed)
        sketch = torch.randn(width, rank, generator=generator, dtype=torch.float64) / rank**0.5
        columns = weight.double() @ sketch.to(weight.device)
    left = as_part(columns, factor_spec(o.left))
    return layer.with_part(LowRankPart(left, as_part(lowrank.project(left.decode(), weight), factor_spec(o.right))))


METHOD = Compress(
    paper="Saha et al. 2023, arXiv 2310.11028",
    options=Options,
    needs=(),
    writes="parts",
    covers={
        "lplr": [{"method": "lplr", "options": {"left": "int8", "right": "int8", "budget": 6.0}}],
    },
    run=compress,
    scheme=scheme,
    masked=False,
    double=True,
)
