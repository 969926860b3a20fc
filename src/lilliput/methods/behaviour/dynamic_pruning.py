"""Dynamic pruning: every token uses only those groups of an MLP's hidden channels that a small predictor chooses.

Hidden channels h (what enters the last linear D of an MLP) are cut into G groups of `group_size` neighbours. On the
calibration text, each token t with MLP input x_t has the contributions

    c_tg = |sum over j in g of D_j h_tj|,    y_tg = c_tg, or log(c_tg + e) with e a thousandth of the mean c,

and the predictor r(x) = B x + b is the ridge regression of y on x, with means taken out,

    B = Y'T X' (X'T X' + lambda I)^-1,    b = mean(y) - B mean(x),

lambda a share of the mean diagonal. At run time a token uses the ceil(keep * G) groups with the largest r(x); the other
groups' rows and columns are left out. The fit sees the finished block, and later blocks see the gated one.

Paper: in the manner of Liu et al. 2023 (Deja Vu), arXiv 2310.17157; regression of contribution norms is ours.
Cost: two more passes of every block and one Gram matrix [inputs, inputs]; G * inputs more weights in float32 per block.
Limits: a token by itself skips the work where the MLP's linears are plain; several tokens at once, and packed linears,
compute everything and set what is left out to zero. Needs an MLP that is one module of plain linears, without experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import contributions
from lilliput.anatomy.model import Anatomy
from lilliput.errors import PlanError
from lilliput.runtime.behaviours.gates import BIAS, WEIGHT
from lilliput.runtime.behaviours.state import GATES
from lilliput.target import Strict
from lilliput.verbs.behave import Behave, Mlp, MlpIO, Shapes, mlp_of


class Options(Strict):
    """See the module's docstring."""

    keep: float = Field(0.5, gt=0.0, le=1.0, description="share of the groups that a token uses")
    channels: int = Field(32, ge=1, description="hidden channels in a group")
    predicts: Literal["norm", "log"] = Field("norm", description="what is regressed: contributions or their logarithms")
    ridge: float = Field(0.01, gt=0.0, description="lambda, as a share of the mean diagonal of the Gram matrix")


def entry(anatomy: Anatomy, o: Options) -> dict[str, Any]:
    """The config's entry."""
    mlps: dict[str, Any] = {}
    for number, name in enumerate(anatomy.block_names):
        mlp = mlp_of(anatomy, number)
        if o.channels > mlp.width:
            raise PlanError(
                f"a group of {o.channels} hidden channels is more than the {mlp.width} of {name}: give fewer `channels`"
            )
        mlps[f"{name}.{mlp.name}"] = {"rows": list(mlp.rows), "columns": mlp.columns}
    common = {"keep": o.keep, "group_size": o.channels}
    return {"kind": GATES, "blocks": list(anatomy.block_names), **common, "mlps": mlps}


def tensors(mlp: Mlp, o: Options) -> Shapes:
    """The predictor's."""
    groups = -(-mlp.width // o.channels)
    return {WEIGHT: (torch.float32, (groups, mlp.inputs)), BIAS: (torch.float32, (groups,))}


def fit(io: MlpIO, o: Options) -> Mapping[str, Tensor]:
    """The predictor, by regression on all tokens."""
    gram = contributions.grams(io.down, o.channels)
    small = 0.0
    if o.predicts == "log":
        count, total = 0, 0.0
        for _, hidden in io.passes():
            found = contributions.norms(hidden, gram)
            count, total = count + found.numel(), total + float(found.sum(dtype=torch.float64))
        small = max(1e-3 * total / max(count, 1), 1e-30)
    groups, inputs = len(gram), io.mlp.inputs
    zeros = {"dtype": torch.float64, "device": io.down.device}
    # The last row and column are of the constant 1, so that sums and means come with the products.
    square = torch.zeros(inputs + 1, inputs + 1, **zeros)  # type: ignore[call-overload]
    cross = torch.zeros(groups, inputs + 1, **zeros)  # type: ignore[call-overload]
    for x, hidden in io.passes():
        y = contributions.norms(hidden, gram)
        y = (y + small).log_() if o.predicts == "log" else y
        x = torch.nn.functional.pad(x, (0, 1), value=1.0).double()
        square += x.T @ x
        cross += y.double().T @ x
    tokens = max(float(square[-1, -1]), 1.0)
    mean_x, mean_y = square[-1, :-1] / tokens, cross[:, -1] / tokens
    centred = square[:-1, :-1] - tokens * torch.outer(mean_x, mean_x)
    moved = cross[:, :-1] - tokens * torch.outer(mean_y, mean_x)
    damping = max(o.ridge * float(centred.diagonal().mean()), 1e-12)
    centred.diagonal().add_(damping)
    factor = torch.linalg.cholesky(centred)
    weight = torch.cholesky_solve(moved.T, factor).T
    return {WEIGHT: weight.float().contiguous(), BIAS: (mean_y - weight @ mean_x).float()}


METHOD = Behave(
    paper="Liu et al. 2023, arXiv 2310.17157",
    options=Options,
    needs=(),
    covers={"dynamic-pruning": [{"method": "dynamic-pruning"}]},
    entry=entry,
    fit=fit,
    tensors=tensors,
    note="Each token uses some of an MLP's hidden channels: one by itself skips the others, several at once do not.",
)
