"""Menu: each linear gets the grid of a menu at which a byte serves it as well as it would serve any other.

For each linear and each grid, the error of its outputs is predicted without quantizing it. With the error D = What - W
and the Gram matrix G of the inputs, GPTQ's sweep leaves tr(D G DT) = sum_ij e_ij^2 / U_jj^2 with rounding errors e (see
`gptq`), so one rounding to nearest on searched ranges, of `rows` rows, and one factor of G tell what the sweep would
leave. Codes between rotations leave it in turn what walks leave of a Gaussian: a share of the mean square weight,
times the sum of 1 / U_jj^2 of the turned G. Where a target has a pattern, the weights of least w_ij^2 / U_jj^2 among
every M are taken to leave that much, as in `sparsegpt`.

What errors cost is measured. All linears are really quantized once, with a grid of the menu near 3 bits, from the
statistics of the calibration text but for its first `trial_samples` samples. On these, models run side by side through
the same walk over the blocks: for the linears of each role in each block one in which they alone have `alone` times
their errors, and some in which all have 1/2, 1, 2 times theirs. The KL divergence of the former from the original, over
the squared factor, is the price of a linear's error, and gives the loss of each of its grids; that of the latter says
what losses come to together, from almost nothing to far beyond where they add up. The choice of least summed loss
within the bytes is found by `budget.choice`.

With `context` the keys and values of so many tokens count in the size too, and each block that keeps a growing cache
gets one of the `caches`, in bits of `kivi`, or keeps it plain. What an entry costs is predicted in the same way. On the
samples of the trials, read piece by piece as through a cache, the squared error that each entry leaves in what the
block's attention gives is measured, exactly. In one more model a block's cache alone is stored in the fewest bits; its
KL divergence, at the tokens that see something encoded, is shared out by these errors: an entry's loss is to it as the
entry's error is to that of the fewest bits. In the models with 1/2, 1, 2 times all errors the caches of all blocks are
stored in fewer and fewer bits as well, so that one curve says what all of it comes to. The options `residual` and
`sinks` are those of the `kivi` steps that the recipe gets at its end. Where a recipe has such steps of its own, they
count, and nothing is chosen for the cache.

Bits for each linear within a number of bytes is also what HAQ (Wang et al. 2019, arXiv 1811.08886) learns by trial;
here the solver decides from what was measured.

An embedding is tried like a linear, its rows rounded; a head loses KL ~ 1/2 sum_v E p_v (1 - p_v) D_v G D_vT / tokens,
a tied table both.

Paper: the sum of losses that single layers cost is HAWQ-V2's, Dong et al. 2019, arXiv 1911.03852, with measured
divergences in place of Hessian traces as in HIGGS, Malinovskii et al. 2024, arXiv 2411.17525; the predicted sweep and
the curve of all together are ours.
Cost: a forward pass over the calibration text and one sweep of every linear; `trial_samples` samples through half of
the blocks for every linear, and for every block with a cache. Limits: inputs are those of the uncompressed model; the
few samples of the trials say how linears compare within a tenth or two; caches are tried at the length of a calibration
sample, whatever `context` is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import masks, obs
from lilliput.budget import menu as menus
from lilliput.formats import ranged
from lilliput.formats.known import from_target
from lilliput.formats.walked import Walked
from lilliput.parts.transform import Rotation
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.choose import Choose, Goal, Stores, Trials

_DAMPING, _SHRINKAGE = 0.01, 0.2  # those of the sweep that is predicted, by default
_STEPS = 15
_ALONE = 3.0  # linears that change alone move a model that computes in 16 bits by more than its rounding does
_WHOLE = (0.5, 1.0, 2.0)


class Options(Strict):
    """See the module's docstring."""

    menu: tuple[str, ...] = Field(
        (menus.DEFAULT,), description="native, integers, compressed-tensors, gguf, prune, or grids such as int3/64/asym"
    )
    size: int | None = Field(None, ge=1, description="the most bytes of the written folder")
    average: float | None = Field(None, gt=0, description="stored bits of a weight on average, scales included")
    seconds: float | None = Field(None, gt=0, description="the longest predicted time of a decoding step")
    device: str | None = Field(None, description="the named device for which that time is predicted")
    context: int | None = Field(
        None, ge=1, description="tokens of one sequence whose keys and values count in the size, and are chosen for too"
    )
    caches: tuple[Annotated[int, Field(ge=2, le=8)], ...] = Field(
        (8, 4, 3, 2), description="bits of keys and values that blocks choose among, beside leaving them as they are"
    )
    residual: int = Field(128, ge=1, description="as of kivi: tokens of a chunk of keys, and latest values that stay")
    sinks: int = Field(4, ge=0, description="as of kivi: first tokens of a sequence that stay plain")
    fused: bool = Field(False, description="one grid for what engines run as one: q/k/v, gate/up, experts")
    rows: int = Field(128, ge=1, description="rows of a linear that are rounded to predict its error")
    trial_samples: int | None = Field(
        None, ge=1, description="calibration samples on which changes are tried; none: a 32nd of all"
    )


def stores(o: Options) -> Stores | None:
    """What is chosen for keys and values."""
    if o.context is None:
        return None
    return Stores(o.context, "kivi", o.caches, {"residual": o.residual, "sinks": o.sinks})


def score(
    weight: Tensor, stats: SiteStats, targets: Sequence[Target], weights: Tensor | None, o: Options
) -> tuple[float, ...]:
    """The expected tr(D G DT) for each target, rows weighed by `weights` [out]; 0 where no token reached the linear."""
    gram = stats.need("gram") if stats.count else None
    if gram is None or float(gram.diagonal().sum(dtype=torch.float64)) <= 0:
        return (0.0,) * len(targets)
    rows, stand_for = drawn(weight, weights, o.rows)
    some = weight[rows].contiguous()
    prices: dict[bool, Tensor] = {}
    errors = []
    for target in targets:
        turned = menus.turned(target)
        if turned not in prices:
            prices[turned] = _price(stats, turned)
        if turned:
            every = torch.ones(len(weight)) if weights is None else weights
            size = weight.square().mean(1, dtype=torch.float64) @ every.to(weight.device).double()
            errors.append(_walked(target) * float(size) * float(prices[True].sum(dtype=torch.float64)))
            continue
        error = rounded(some, gram.diagonal() * (1 + _DAMPING), target, prices[False])
        errors.append(float(stand_for @ (error @ prices[False]).double()))
    return tuple(errors)


def drawn(weight: Tensor, weights: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Numbers of at most `count` rows, evenly along their summed energy, and how many rows like it each stands for."""
    energy = weight.square().sum(1, dtype=torch.float64)
    cost = torch.ones_like(energy) if weights is None else weights.to(weight.device).double()
    if len(weight) <= count:
        return torch.arange(len(weight), device=weight.device), cost
    sums = (energy * cost).clamp_(min=1e-300).cumsum(0)
    at = (torch.arange(count, dtype=sums.dtype, device=sums.device) + 0.5) / count * sums[-1]
    places = torch.searchsorted(sums, at).clamp_(max=len(cost) - 1)
    rows, often = places.unique(return_counts=True)  # type: ignore[no-untyped-call]
    return rows, often * (sums[-1] / count) / energy[rows].clamp(min=1e-300)


def rounded(weight: Tensor, importance: Tensor, target: Target, price: Tensor) -> Tensor:
    """Squared errors of a rounding to nearest on searched ranges, [out, in], after the pruning that a target asks for:
    of the weights whose squares times `price` [in] are least."""
    form, support = from_target(target), None
    if menus.pruned(target):
        support = masks.choose(weight.square() * price, None, target.pattern, "row")
    held = weight if support is None else weight * support
    grid = ranged.fit(form, held, importance, ranged.RangeRule("mse", _STEPS))
    rounded_to = form.decode(form.encode(held, grid), grid)
    return (rounded_to if support is None else rounded_to * support).sub_(weight).square_()


def _price(stats: SiteStats, turned: bool) -> Tensor:
    """What a sweep pays for a squared rounding error of each column, [in]; in the order of sweeps between rotations."""
    seen = stats.through((Rotation("hadamard", 0),)) if turned else stats
    gram = seen.need("gram")
    order = gram.diagonal().argsort(descending=True, stable=True)
    pivot = obs.factorize(gram, _DAMPING, None if turned else order, _SHRINKAGE).pivot.square()
    return pivot if turned else torch.empty_like(pivot).index_copy_(0, order, pivot)


def _walked(target: Target) -> float:
    """The mean square error of codes for a Gaussian of mean square 1."""
    return _share(target.format, target.bits or 0)


@functools.lru_cache(maxsize=32)
def _share(name: str, bits: int) -> float:
    form = from_target(Target(format=name, bits=bits, group_size="tensor", scale_dtype="float16").model_copy(
        update={"group_size": 0}
    ))  # fmt: skip
    if not isinstance(form, Walked):
        raise RuntimeError(f"{form.describe()} is no code between rotations")
    sample = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    grid = form.fit(sample, importance=torch.ones(32))
    error = form.decode(form.encode(sample, grid), grid) - sample
    return float(error.square().sum() / sample.square().sum())


METHOD = Choose(
    paper="Dong et al. 2019, arXiv 1911.03852; Malinovskii et al. 2024, arXiv 2411.17525",
    options=Options,
    needs=("gram",),
    note="Measuring decides who gets which grid: the sizes shown are the least there can be.",
    covers={
        "haq": [
            {"method": "menu", "options": {"menu": ["integers"], "average": 3.25}},
            {"method": "gptq", "target": {"bits": 2, "group_size": 64, "symmetric": False}},
        ],
    },
    recipe=[
        {"method": "menu", "options": {"menu": ["integers"], "average": 4.0}},
        {"method": "gptq", "target": {"bits": 2, "group_size": 64, "symmetric": False}},
    ],
    score=score,
    entries=lambda o: menus.entries(o.menu),
    goal=lambda o: Goal(o.size, o.average, o.seconds, o.device),
    trials=lambda o: Trials(o.trial_samples, _ALONE, _WHOLE),
    stores=stores,
    fused=lambda o: o.fused,
    governs=("gptq", "mixed"),
)
