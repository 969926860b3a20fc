"""Truncated SVD: a linear as two thinner ones, with the optimum of a weighted error.

What = A B, A [out, k], B [k, in], k = floor(ratio * out * in / (out + in)) or the target's rank. Where the factors
would hold as many numbers as the weight, the layer stays as it is. The error is |diag(r) (W - What) M^(1/2)|^2;
`weighting` chooses r and M:

    none      r = 1, M = 1: W = U S VT, What = U_k S_k V_kT
    absmean   M = diag(s^2), s_j = (mean |x_j|)^alpha + 1e-6 (ASVD)
    gram      M = G = sum of x xT: the least error of the outputs that any matrix of rank k has on the calibration text
    fisher    r_i^2 = sum_j F_ij (outputs), or M = diag(sum_i F_ij) (inputs), F the mean squared gradient (FWSVD); both
              at once, which is F's own product of margins, is an extension

SVD-LLM truncates U S VT = W L, L LT = G, and multiplies by L^-1: U_k S_k V_kT L^-1 = U_k U_kT W. LoRD projects the
outputs on the leading eigenvectors of their covariance W G WT, which are the same U: both are `gram`, and differ in
how the factors share the singular values. With `split` right A is U_k itself and B = U_kT W, as LoRD stores them (its
centring, which needs a bias, is left out). No inverse is taken, so singular Gram matrices are served as any other.

A is rounded to its stored type first; B is then the least-squares fit for that A, whatever the metric of the inputs.

Paper: SVD: Eckart and Young 1936; ASVD: Yuan et al. 2023, arXiv 2312.05821; SVD-LLM: Wang et al. 2024, arXiv
2403.07378; LoRD: Kaushal et al. 2023, arXiv 2309.14021; FWSVD: Hsu et al. 2022, arXiv 2207.00112.
Cost: an eigendecomposition of the smaller side in float64, two with `gram` and fewer inputs than outputs; out * in^2
for the covariance. Limits: the spectra of language models decay slowly; below a ratio of about 0.8 all variants hurt.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from lilliput.algebra import lowrank
from lilliput.errors import LilliputError, PlanError
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import Factors, LowRankSpec, approximate, factor_spec, rest_of
from lilliput.parts.scheme import Scheme
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress


def _recipe(ratio: float = 0.8, **options: Any) -> list[dict[str, Any]]:
    return [{"method": "svd-truncate", "target": {"ratio": ratio}, "options": options}]


class Options(Strict):
    """See the module's docstring."""

    weighting: Literal["none", "absmean", "gram", "fisher"] = Field("none", description="the error to minimise")
    alpha: float = Field(0.5, ge=0.0, le=2.0, description="absmean: exponent of mean |x|; 0 weighs all inputs alike")
    axis: Literal["outputs", "inputs", "both"] = Field(
        "both", description="fisher: whether the sums over rows, over columns or both weigh the error"
    )
    split: Literal["even", "right"] = Field(
        "even", description="where the singular values go: their roots into both factors, or all into the right one"
    )
    factors: Factors = Field("float16", description="how the factors are stored")


def needs(o: Options) -> tuple[str, ...]:
    """What the weighting reads."""
    return () if o.weighting == "none" else (o.weighting,)


def rank_of(target: Target, rows: int, width: int) -> int | None:
    """The rank that `target` gives a [rows, width] linear; None where it stays as it is, as nothing would be saved.

    Raises PlanError where the target names neither rank nor ratio, leaves no rank at all, or one above the matrix's.
    """
    if target.rank is not None:
        rank = lowrank.checked(target.rank, rows, width)
    elif target.ratio is not None:
        rank = math.floor(target.ratio * rows * width / (rows + width) + 1e-9)
    else:
        raise PlanError("a low-rank step needs target.ratio (share of the parameters to keep, to 1) or target.rank")
    whole = target.rank is None and target.ratio == 1.0
    if whole or rank >= lowrank.break_even(rows, width):
        return None
    if rank < 1:
        least = math.ceil(1e4 * (rows + width) / (rows * width)) / 1e4
        raise PlanError(
            f"no rank is left for a [{rows}, {width}] linear: give a target.ratio of {least} or more, or rank 1"
        )
    return rank


def scheme(target: Target, options: Options, rows: int, width: int) -> Scheme:
    """Two factors, or nothing where they would not be smaller than the weight. Raises PlanError; see `rank_of`."""
    rank = rank_of(target, rows, width)
    factor = factor_spec(options.factors)
    return Scheme() if rank is None else Scheme((LowRankSpec(rank, factor, factor),))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with its product of factors, or as it is; see `scheme`.

    Raises LilliputError for a weight or statistic that is not finite, a pruned layer, or a missing Fisher information.
    """
    rank = rank_of(target, *layer.weight.shape)
    if rank is None:
        return layer
    weight = rest_of(layer)
    metric, rows = weights_of(layer, stats, o)
    return layer.with_part(approximate(weight, rank, factor_spec(o.factors), metric, rows, o.split))


def weights_of(layer: Layer, stats: SiteStats, o: Options) -> tuple[Tensor | None, Tensor | None]:
    """Metric of the inputs ([in], [in, in] or None), weights of the rows ([out] or None), as in `algebra.lowrank`."""
    if o.weighting == "fisher":
        return _fisher(layer, o.axis)
    return metric_of(stats, o.weighting, o.alpha), None


def metric_of(stats: SiteStats, weighting: Literal["none", "absmean", "gram"], alpha: float) -> Tensor | None:
    """The metric of the inputs that a weighting means."""
    if weighting == "none" or stats.count == 0:
        return None
    if weighting == "gram":
        return stats.need("gram")
    return (stats.need("absmean").double().pow(alpha) + 1e-6).square()


def _fisher(layer: Layer, axis: Literal["outputs", "inputs", "both"]) -> tuple[Tensor | None, Tensor | None]:
    if layer.fisher is None:
        raise LilliputError(f"{layer.name} has no Fisher information: weighting 'fisher' needs squared gradients")
    if layer.inputs or layer.outputs:
        raise LilliputError(f"{layer.name} is transformed, but its Fisher information is not: use weighting 'gram'")
    squares = layer.fisher.double()
    columns, sums = squares.sum(0), squares.sum(1)
    total = float(sums.sum())
    if not math.isfinite(total):
        raise LilliputError(f"the Fisher information of {layer.name} contains NaN or infinity: check the data")
    if not total > 0.0:
        return None, None  # no token reached it, as an expert that nothing was routed to: all weights count alike
    # Outputs that no token used weigh little, not nothing: their rows are divided by their weight.
    rows = (sums / sums.mean()).clamp_min(1e-6).sqrt()
    return (columns if axis != "outputs" else None), (rows if axis != "inputs" else None)


METHOD = Compress(
    paper="Eckart and Young 1936; Yuan et al. 2023, arXiv 2312.05821; Wang et al. 2024, arXiv 2403.07378",
    options=Options,
    needs=("gram", "absmean", "fisher"),
    reads=needs,
    writes="parts",
    default={"ratio": 0.8},
    covers={
        "svd-truncate": _recipe(),
        "asvd": [{"method": "ranks", "options": {"weighting": "absmean"}}, *_recipe(weighting="absmean")],
        "svd-llm": _recipe(weighting="gram"),
        "fisher-svd": _recipe(weighting="fisher"),
        "lord": _recipe(weighting="gram", split="right"),
    },
    run=compress,
    scheme=scheme,
    masked=False,
    double=True,
)
