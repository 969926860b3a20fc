"""Menu: each linear gets the grid of a menu at which a byte serves it as well as it would serve any other.

For each linear and each grid, the loss of quantizing this linear alone is foreseen from one forward and one backward
pass. With the error D = What - W, g the gradient of the loss by an output y = W x, and tokens taken as independent, the
loss of the whole model (its KL divergence from the original) rises by

    KL ~ (T - 1) / 2  sum_i F_i  D_i G D_iT / tr G,     F_i = sum_j E (dL_n / dW_ij)^2

to second order: G the Gram matrix of the inputs, L_n the mean cross-entropy of a sample of T tokens. GPTQ's sweep
leaves D_i G D_iT = sum_j e_ij^2 / U_jj^2 with rounding errors e (see `gptq`), so one rounding to nearest on searched
ranges, of `rows` rows, and one factor of the Gram matrix give what the sweep would leave, without the sweep.

A few linears are then really quantized, each alone, with the smallest and the largest grid of the menu, and the
difference in KL divergence is measured through the rest of the model: what was foreseen is multiplied by the ratio, by
role of the linear. The choice of least summed loss within the bytes is
found by `budget.choice`.

An embedding loses what its rows lose as often as they are looked up, times the squared gradient that enters the first
block; a head KL ~ 1/2 sum_v E p_v (1 - p_v) D_v G D_vT / tokens. A tied table loses both.

Paper: HAWQ-V2, Dong et al. 2019, arXiv 1911.03852 (second-order sensitivities, one decision for all layers); the
prediction of GPTQ's loss and its correction by trials are ours.
Cost: a backward and a forward pass over the calibration text, and for each trial two forward passes of the blocks
behind it over `trial_samples` samples. Limits: losses of linears are added as if they were independent, and inputs are
those of the uncompressed model: at 2 bits everywhere the sum says too little.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import obs
from lilliput.budget import menu as menus
from lilliput.formats import ranged
from lilliput.formats.known import from_target
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.choose import Choose, Goal, Trials

_DAMPING, _SHRINKAGE = 0.01, 0.2  # those of the sweep that is foreseen, by default
_STEPS = 15


class Options(Strict):
    """See the module's docstring."""

    menu: tuple[str, ...] = Field(
        (menus.DEFAULT,), description="native, compressed-tensors, or grids such as int3/64/asym"
    )
    size: int | None = Field(None, ge=1, description="the most bytes of the written folder")
    average: float | None = Field(None, gt=0, description="stored bits of a weight on average, scales included")
    fused: bool = Field(False, description="one grid for what engines run as one: q/k/v, gate/up, experts")
    rows: int = Field(256, ge=1, description="rows of a linear that are rounded to foresee its loss")
    trials: int = Field(8, ge=0, description="single linears that are really quantized, to correct what is foreseen")
    trial_samples: int = Field(4, ge=1, description="calibration samples that a trial is measured on")
    fisher_samples: int | None = Field(
        32, ge=1, description="calibration samples that squared gradients are taken over; none: all"
    )


def score(weight: Tensor, stats: SiteStats, cost: Tensor, targets: Sequence[Target], o: Options) -> tuple[float, ...]:
    """sum_i F_i D_i G D_iT / tr G for each target, F_i being `cost` [out]; 0 where no token reached the linear."""
    gram = stats.need("gram") if stats.count else None
    energy = 0.0 if gram is None else float(gram.diagonal().sum(dtype=torch.float64))
    if gram is None or energy <= 0:
        return (0.0,) * len(targets)
    order = gram.diagonal().argsort(descending=True, stable=True)
    factor = obs.factorize(gram, _DAMPING, order, _SHRINKAGE)
    price = torch.empty_like(factor.pivot).index_copy_(0, order, factor.pivot.square())
    rows, weighed = drawn(cost.double(), o.rows)
    errors = rounded(weight[rows].contiguous(), gram.diagonal() * (1 + _DAMPING), targets, price)
    return tuple(float(weighed @ x) / energy for x in errors)


def drawn(cost: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Numbers of at most `count` rows, drawn evenly along the summed cost [out], and what each of them stands for."""
    if len(cost) <= count:
        return torch.arange(len(cost), device=cost.device), cost
    sums = cost.cumsum(0)
    at = (torch.arange(count, dtype=sums.dtype, device=cost.device) + 0.5) / count * sums[-1]
    places = torch.searchsorted(sums, at).clamp_(max=len(cost) - 1)
    rows, often = places.unique(return_counts=True)  # type: ignore[no-untyped-call]
    return rows, often * (sums[-1] / count)


def rounded(weight: Tensor, importance: Tensor, targets: Sequence[Target], price: Tensor) -> list[Tensor]:
    """For each target, sum_j e_ij^2 price_j of a rounding to nearest on searched ranges, float64 [out]."""
    found = []
    for target in targets:
        form = from_target(target)
        grid = ranged.fit(form, weight, importance, ranged.RangeRule("mse", _STEPS))
        error = form.decode(form.encode(weight, grid), grid) - weight
        found.append((error.square() @ price).double())
    return found


METHOD = Choose(
    paper="Dong et al. 2019, arXiv 1911.03852",
    options=Options,
    needs=("gram", "fisher"),
    fisher_samples=lambda o: o.fisher_samples,
    note="Measuring decides who gets which grid: the sizes shown are the least there can be.",
    covers={},
    recipe=[
        {"method": "menu", "options": {"menu": ["native"], "average": 4.0}},
        {"method": "gptq", "target": {"bits": 2, "group_size": 64, "symmetric": False}},
    ],
    score=score,
    entries=lambda o: menus.entries(o.menu),
    goal=lambda o: Goal(o.size, o.average),
    trials=lambda o: Trials(o.trials, o.trial_samples),
    fused=lambda o: o.fused,
    governs=("gptq",),
)
