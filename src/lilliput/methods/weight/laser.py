"""LASER: one matrix is replaced by its approximation of low rank, kept dense or as two factors.

What = sum of the first k terms of the SVD, k = floor(kept * min(out, in)) or the target's rank. `where` names the
matrix. The authors find that a very low rank (kept about 0.01) of an MLP input matrix in a late block raises accuracy
on some tasks. Which matrices, and which ranks, `laser-search` in front of it finds by the model's loss on text of the
task. With `factored` false the result is a plain tensor that any engine reads, and saves nothing.

Paper: Sharma et al. 2023, arXiv 2312.13558.
Cost: an eigendecomposition of the smaller side of each matrix. Limits: gains are task specific, and perplexity rises;
with `factored`, a rank from break-even on is refused, because it would save nothing.
"""

from __future__ import annotations

import math

from pydantic import Field

from lilliput.algebra import lowrank
from lilliput.errors import PlanError
from lilliput.parts.dense import DensePart
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import Factors, LowRankSpec, approximate, factor_spec, rest_of
from lilliput.parts.scheme import Scheme
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

MLP_INPUT = ("up_proj", "gate_up_proj", "c_fc", "fc1", "dense_h_to_4h")


class Options(Strict):
    """See the module's docstring."""

    kept: float = Field(0.1, gt=0.0, le=1.0, description="rank as a share of the largest possible; target.rank wins")
    factored: bool = Field(False, description="store two factors instead of the dense matrix of lower rank")
    factors: Factors = Field("float16", description="how factors are stored")


def replaces(o: Options) -> bool:
    """Whether what is left is a plain weight, which no other step may touch."""
    return not o.factored


def rank_of(target: Target, o: Options, rows: int, width: int) -> int | None:
    """At least 1; None where the layer stays as it is (a target.ratio of 1).

    Raises PlanError for another ratio, a rank that the matrix cannot have, or one that factors gain nothing from.
    """
    if target.ratio == 1.0:
        return None
    if target.ratio is not None:
        raise PlanError(f"'laser' has no target.ratio {target.ratio}: give it kept, a share of ranks, or target.rank")
    most = min(rows, width)
    rank = (
        max(1, math.floor(o.kept * most + 1e-9)) if target.rank is None else lowrank.checked(target.rank, rows, width)
    )
    limit = lowrank.break_even(rows, width)
    if o.factored and rank >= limit:
        raise PlanError(
            f"two factors of rank {rank} are no smaller than the [{rows}, {width}] linear: give a rank below {limit}, "
            f"kept below {limit / most:.2f}, or factored=false"
        )
    return rank


def scheme(target: Target, options: Options, rows: int, width: int) -> Scheme:
    """Two factors, or a plain tensor. Raises PlanError; see `rank_of`."""
    rank, factor = rank_of(target, options, rows, width), factor_spec(options.factors)
    return Scheme((LowRankSpec(rank, factor, factor),) if options.factored and rank is not None else ())


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with one part, or as it is; see `rank_of`.

    Raises LilliputError for a weight that is not finite, and for a pruned layer.
    """
    weight = rest_of(layer)
    rank = rank_of(target, o, *weight.shape)
    if rank is None:
        return layer
    if o.factored:
        return layer.with_part(approximate(weight, rank, factor_spec(o.factors)))
    basis = lowrank.spectrum(weight).basis[:, :rank]
    if rank == min(weight.shape):
        return layer.with_part(DensePart(weight))  # the identity, to the last bit
    return layer.with_part(DensePart((basis @ (basis.T @ weight.double())).float()))


METHOD = Compress(
    paper="Sharma et al. 2023, arXiv 2312.13558",
    options=Options,
    needs=(),
    writes="parts",
    covers={
        "laser": [
            {
                "method": "laser",
                "options": {"kept": 0.1},
                "where": {"include": [f"*.1.mlp.{name}" for name in MLP_INPUT]},
            }
        ],
    },
    run=compress,
    scheme=scheme,
    replaces=replaces,
    masked=False,
    double=True,
)
