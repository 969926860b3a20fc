"""QuIP: turn a weight until no entry stands out, then quantize it; the turns stay in the model and run with it.

1. s_j = (G_jj / sum_i w_ij^2)^(1/4), of geometric mean 1; W <- W diag(s), G <- diag(s)^-1 G diag(s)^-1.
2. W <- U W VT, G <- V G VT with random orthogonal U [out, out] and V [in, in] that cost little to apply.
3. LDLQ with H = G + damping * mean(diag) * I = (T + I) Delta (T + I)T, T strictly upper: column by column
   what_k = Q(w_k + sum_{i<k} (w_i - what_i) T_ik).
4. y = UT (What (V (x / s))): nothing but the seed and, in float16, 1 / s is stored of the turns.

Q is the format. "int" and "affine" round single weights (QuIP), on ranges searched as gptq's are; `search` rms is the
paper's range instead, [-r, r] with r = 2.4 root mean squares of the whole matrix, wider than the least error asks for:
its evenly spaced levels lie on both sides of 0 and not on it, which takes "affine". "e8" is the codebook of QuIP#,
"trellis" the code of QTIP, "vector" a learned codebook. These three round eight, many, or a few outputs of one input
together. Outputs do not interact in tr(D H DT), so this needs no block LDLQ, and no feedback between inputs is lost.

Beyond the papers, without gradients: `shrinkage` as in gptq, before anything is turned; `widen`, because what step 3
rounds is larger than W by the errors that it takes up; and `refine` passes take the scales to their least-squares
values and then each column to its best value given all others: the loss on the calibration text never rises with one
scale per tensor, and hardly ever with one per row. Without scales and turns, "int" is LDLQ (gptq without act_order).

Paper: Chee et al. 2023, arXiv 2307.13304; QuIP#: Tseng et al. 2024, arXiv 2402.04396; QTIP: Tseng et al. 2024, arXiv
2406.11235. Cost: out * in^2 multiply-adds for the sweep and twice that for a refining pass; in each of them out * in *
2^12 more for trellis codes, out * in * 512 for e8. Limits: the outputs are mixed, so linears are not stacked and no
mask survives; a decoded checkpoint is not small. A width without a large Hadamard factor costs a dense turn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import ldlq, obs
from lilliput.algebra.ranges import stored as stored_scale
from lilliput.errors import LilliputError, PlanError
from lilliput.formats import vector
from lilliput.formats.known import from_target
from lilliput.formats.ranged import Spaced
from lilliput.formats.swept import Sweepable
from lilliput.formats.walked import Walked
from lilliput.methods.weight import gptq
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.parts.transform import Rotation, Scale, ScaleSpec, Transform
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress

_FURTHEST = 64.0  # of a scale from 1
_REACH = 2.4  # root mean squares of a turned weight, in the paper's range


class Options(Strict):
    """See the module's docstring."""

    turn: Literal["hadamard", "kronecker", "none"] = Field("hadamard", description="the random orthogonal matrices")
    seed: int = Field(0, ge=0, description="of the random orthogonal matrices")
    diagonal: bool = Field(True, description="balance weights and inputs by a stored scale for each input")
    damping: float = Field(0.01, ge=0.0, le=10.0, description="added to the Gram diagonal, as a share of its mean")
    shrinkage: float = Field(
        0.2, ge=0.0, le=10.0, description="added to each Gram diagonal entry, as a share of itself; 0 is the paper's"
    )
    search: Literal["mse", "rms"] = Field(
        "mse", description="range of int and affine: of least error, or 2.4 root mean squares of the matrix (affine)"
    )
    widen: float = Field(1.08, gt=0.0, le=4.0, description="factor on the scale of codebooks before the sweep")
    refine: int = Field(1, ge=0, le=50, description="passes of coordinate descent over scales and columns")


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """Codes between the turns. Raises PlanError where the format cannot have the target."""
    form = from_target(target)
    if o.search == "rms" and not isinstance(form, Spaced):
        raise PlanError(
            f"search rms spaces levels evenly about 0, which {form.describe()} cannot do: set target.format to "
            "affine and group_size to channel, or leave out search"
        )
    scales = (ScaleSpec(),) if o.diagonal else ()
    into, out_of = _turns(o)
    return Scheme((QuantizedSpec(form),), (*scales, *into), out_of)


def _turns(o: Options) -> tuple[tuple[Rotation, ...], tuple[Rotation, ...]]:
    if o.turn == "none":
        return (), ()
    return (Rotation(o.turn, 2 * o.seed),), (Rotation(o.turn, 2 * o.seed + 1),)


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with turns and codes.

    Raises PlanError for a mask under turns or a codebook, and LilliputError for a weight or Gram matrix that is not
    finite.
    """
    form = from_target(target)
    planned = scheme(target, o, *layer.weight.shape)
    if layer.support is not None and (planned.inputs or planned.outputs or not form.holds_zero):
        raise PlanError(
            f"{layer.name}: a mask does not survive {planned.describe()}: prune without "
            "quip, or use quip without pruning"
        )
    if o.shrinkage:
        gram = stats.need("gram").clone()
        gram.diagonal().mul_(1.0 + o.shrinkage)
        stats = replace(stats, gram=gram)
    into, out_of = _turns(o)
    inputs: tuple[Transform, ...] = (_balance(layer, stats.need("gram")), *into) if o.diagonal else into
    rotated = layer.between(inputs, out_of) if inputs or out_of else layer
    stats = stats.through(inputs)  # in place of what it is made from: Gram matrices are large
    if isinstance(form, Sweepable):
        options = gptq.Options(act_order=False, damping=o.damping, shrinkage=0.0, refine=o.refine)
        grid = form.even(rotated.rest(), _REACH) if o.search == "rms" and isinstance(form, Spaced) else None
        return gptq.rounded(rotated, stats, form, options, grid)
    if not isinstance(form, Walked):
        raise PlanError(f"'quip' has no sweep for {form.describe()}")
    return rotated.with_part(_walk(rotated.rest(), stats.need("gram"), form, o))


def _balance(layer: Layer, gram: Tensor) -> Scale:
    """x is divided by s; an input that is never active or never read keeps 1."""
    energy, size = gram.diagonal().double(), layer.weight.double().square().sum(0)
    if not bool(torch.isfinite(energy.sum() + size.sum())):
        what = "weight" if not bool(torch.isfinite(size.sum())) else "Gram matrix of the inputs"
        raise LilliputError(
            f"the {what} of {layer.name} contains NaN or infinity: check the model and calibration data"
        )
    usable = (energy > 0) & (size > 0)
    exponent = torch.where(usable, (energy.clamp(min=1e-300).log() - size.clamp(min=1e-300).log()) / 4, 0.0)
    exponent = torch.where(usable, exponent - exponent.sum() / usable.sum().clamp(min=1), 0.0)
    return Scale(exponent.neg().exp().clamp(1 / _FURTHEST, _FURTHEST).half())


def _walk(weight: Tensor, gram: Tensor, form: Walked, o: Options) -> QuantizedPart:
    """Sweep and refining passes with a format that rounds whole columns."""
    factor = obs.factorize(gram, o.damping)
    grid = form.fit(weight, importance=gram.diagonal())
    grid = replace(grid, scale=_stored(grid.scale.float() * o.widen, form))
    columns = weight.T.contiguous()
    codes = torch.empty(columns.shape, dtype=torch.int32, device=weight.device)
    deviation = ldlq.sweep(columns, factor, form.settle(grid, len(weight)), codes)
    ridge = factor.damping * float(gram.diagonal().mean())
    for _ in range(o.refine):
        grid = _rescale(columns, deviation, gram, ridge, form, grid)
        ldlq.polish(columns, deviation, gram, ridge, form.settle(grid, len(weight)), codes)
    if o.refine:
        grid = _rescale(columns, deviation, gram, ridge, form, grid)
    return QuantizedPart(form, codes.T.contiguous(), grid)


def _rescale(
    columns: Tensor,
    deviation: Tensor,
    gram: Tensor,
    ridge: float,
    form: Walked,
    grid: vector.VectorGrid,
) -> vector.VectorGrid:
    """Scales at their least-squares values c H w / c H c where the loss falls by it; `deviation` [in, out] follows."""
    values = columns - deviation
    through = torch.addmm(values * ridge, gram, values)
    slope, bend = ((through * x).sum(0, keepdim=True).double() for x in (deviation, values))
    if grid.scale.shape == (1, 1):
        slope, bend = slope.sum(1, keepdim=True), bend.sum(1, keepdim=True)
    ratio = torch.where(bend > 0, 1 + slope / bend.clamp(min=1e-300), 1.0).float()
    old = grid.scale.float()
    proposal = _stored(old * ratio.T, form)
    step = (proposal.float() / old - 1).T
    falls = (step * (step * bend - 2 * slope) < 0) & torch.isfinite(step) & (step > -1)
    deviation -= values * torch.where(falls, step, 0.0).float()
    return replace(grid, scale=torch.where(falls.T, proposal, grid.scale))


def _stored(scale: Tensor, form: Walked) -> Tensor:
    return stored_scale(scale, form.scale_dtype).to(form.scale_dtype)


METHOD = Compress(
    paper="Chee et al. 2023, arXiv 2307.13304",
    options=Options,
    needs=("gram",),
    writes="quantized",
    formats=("int", "affine", "e8", "vector", "trellis", "trellis-half"),
    baseline="rtn",
    covers={"quip": [{"method": "quip", "target": {"bits": 4}}]},
    run=compress,
    scheme=scheme,
    sweeps=lambda o: 1 + o.refine,
)
