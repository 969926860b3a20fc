"""LoRC: a low-rank part for what quantization lost.

E = W - What ~ (U_m S_m^1/2) (S_m^1/2 V_mT), the m largest singular values of the rest that earlier steps leave; y = x
WhatT + (x B_rT) A_lT. The left factor is rounded as it will be stored, and the right one then is the least-squares
answer to it, so that the factors' own rounding is made up for.

Paper: Yao et al. 2023, ZeroQuant-V2, arXiv 2303.08302.
Cost: the eigenvectors of a matrix of the smaller side, in float64. Limits: the rest of a good quantizer is close to
noise, of which low rank catches little; place it behind a quantizer of 2 or 3 bits. It knows nothing of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.dense import DensePart, DenseSpec
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import LowRankPart, LowRankSpec
from lilliput.parts.part import Part, PartSpec
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.recipe import Strict, Target
from lilliput.stats.site import SiteStats

PAPER = "Yao et al. 2023, arXiv 2303.08302"
NEEDS: tuple[str, ...] = ()
WRITES: Literal["parts"] = "parts"
ROWWISE = False
BASELINE: str | None = None
COVERS: Mapping[str, list[dict[str, Any]] | None] = {
    "lorc": [
        {"method": "rtn", "target": {"bits": 4}},
        {"method": "lorc", "target": {"rank": 8}},
    ],
}


class Options(Strict):
    """See the module's docstring."""

    factors: Literal["float16", "int8"] = Field("float16", description="how both factors are stored")


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """One low-rank part. Raises PlanError without a rank, or for one above the matrix's."""
    if target.rank is None:
        raise PlanError("'lorc' needs a rank: set target.rank, such as 8")
    if target.rank > min(rows, width):
        raise PlanError(
            f"a rank of {target.rank} is above that of a {rows} x {width} matrix: {min(rows, width)} is all"
        )
    factor: PartSpec = DenseSpec(torch.float16) if o.factors == "float16" else QuantizedSpec(_integers())
    return Scheme((LowRankSpec(target.rank, factor, factor),))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The low-rank part of what the layer's parts leave over.

    Raises PlanError for a pruned layer (a low-rank part reaches every weight) and without a rank, LilliputError for a
    weight that is not finite or whose factors exceed float16.
    """
    rest = layer.rest()
    scheme(target, o, *rest.shape)
    if layer.support is not None:
        raise PlanError(f"{layer.name} is pruned, and a low-rank part reaches every weight: leave one step out")
    if not bool(torch.isfinite(rest.sum())):
        raise LilliputError(f"{layer.name} holds NaN or infinite values: it cannot be factored")
    left, right = _factors(rest, target.rank or 0, o)
    if not all(bool(torch.isfinite(x.decode()).all()) for x in (left, right)):
        raise LilliputError(f"the factors of {layer.name} exceed float16: leave the layer out")
    return layer.with_part(LowRankPart(left, right))


def _integers() -> IntegerFormat:
    return IntegerFormat(8, True, -1)


def _stored(factor: Tensor, o: Options) -> Part:
    if o.factors == "float16":
        return DensePart(factor, torch.float16)
    form = _integers()
    grid = form.fit(factor, search="mse")
    return QuantizedPart(form, form.encode(factor, grid), grid)


def _factors(rest: Tensor, rank: int, o: Options) -> tuple[Part, Part]:
    """Left [out, rank] and right [rank, in] as they are stored."""
    e = rest.double()
    tall = e.shape[0] > e.shape[1]
    vectors = torch.linalg.eigh(e.T @ e if tall else e @ e.T)[1].flip(1)[:, :rank]
    side = e @ vectors if tall else vectors.T @ e  # singular values times the vectors of the other side
    sizes = side.norm(dim=0 if tall else 1)
    root = sizes.sqrt().clamp(min=1e-30)
    left = _stored((side / root if tall else vectors * root).float(), o)
    # Least squares on the factor as it is stored; directions of no size stay out.
    right = torch.linalg.pinv(left.decode().double(), rtol=1e-7) @ e
    return left, _stored(right.float(), o)
