"""AWQ: scale up the weights of strong inputs before quantization, so that they are rounded more finely.

For each link (who produces an input -> the linears that read it): m_j = mean |X_j|; for a = 0, 1/n, ..., (n-1)/n:
s = m^a / sqrt(max s * min s), What = Q(W diag(s)) diag(s)^-1; the a of least error is kept, and s folds into the
producer. A reader's error is exact over the calibration tokens, from the Gram matrix G of the inputs:
e(s) = tr((W - What) G (W - What)T). a = 0 is no change, so the judged error never rises. Inputs that share a producer
row (grouped queries) share the mean of their m.

Readers whose outputs meet those of other tokens (queries, keys, values) can be judged, as in the paper's code, by how
far the block's output moves with all of them compressed (`outputs` "block"), under "sweep" by GPTQ itself. Their own
errors tell less: those of queries, which the softmax softens, are ten to ninety times those of values, and attention
passes on only what the values' errors have in common over many tokens.

Of linears with many outputs only `rows` rows are judged: rows agree on the strong inputs, and all of them cost several
times as much (0 takes all rows, and only then is the error exact).

Beyond the paper: `even` first tries s = w^-b, b = 1/4 ... 1, with w_j the root mean square of column j over all
readers, which evens out the columns that share a scale, and then the exponents a on top of the best b. `judge` "sweep"
prepares for GPTQ instead of rounding to nearest: the sweep pays R_jj^2 / s_j^2 for the squared rounding error of column
j (`algebra.obs`), so the sum of that is compared; it needs no product with G.

The paper's clip search is left to the next step: `rtn` and `gptq` search the range of every group, of q and k too, for
the least error weighted by the inputs' mean squares, which is the diagonal of what the paper compares.

Paper: Lin et al. 2024, arXiv 2306.00978.
Cost: n * min(out, rows) * in^2 multiply-adds for each reader; where the block's output judges, n + 4 times two samples
through the block, and under "sweep" as many times the readers' GPTQ. Limits: needs verified links; what steps other
than `rtn` and `gptq` will make of the weights is not taken into account.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import obs
from lilliput.anatomy.model import Linear, Link
from lilliput.folds.kinds import ScaleFold
from lilliput.formats import known, ranged
from lilliput.formats.format import Format
from lilliput.machine.cost import Cost
from lilliput.methods.weight import gptq
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.streaming import peak
from lilliput.streaming.peak import Run
from lilliput.target import Strict, Target
from lilliput.verbs.rewrite import Rewrite
from lilliput.verbs.view import BlockIO, BlockView

_TOKENWISE = ("o", "gate", "up", "gate_up", "down")  # roles whose outputs meet no other token's before the block's


class Options(Strict):
    """How the scales are searched."""

    grid: int = Field(20, ge=2, le=100, description="exponents of the inputs tried: 0, 1/grid, ..., (grid - 1)/grid")
    even: bool = Field(True, description="also try scales that even out the weights' columns")
    judge: Literal["rounding", "sweep"] = Field("rounding", description="what quantizes later: rtn, or gptq's sweep")
    outputs: Literal["block", "linears"] = Field(
        "linears",
        description="judge queries, keys and values by their own outputs, like all others, or by the block's output",
    )
    search: Literal["minmax", "mse"] = Field("mse", description="range of a group in the trial quantization")
    steps: int = Field(8, ge=1, le=200, description="shrink factors of that range search")
    gain: float = Field(0.0, ge=0.0, lt=1.0, description="relative fall of the judged error that a scale must bring")
    rows: int = Field(256, ge=0, description="judge by this many rows of each linear, evenly spaced (0: all)")
    damping: float = Field(0.01, ge=0.0, le=10.0, description="judge sweep: damping of the later sweep")


def rewrite(block: BlockView, io: BlockIO, target: Target, o: Options) -> Sequence[ScaleFold]:
    """One fold per link that gains; none where the site saw no tokens. Raises PlanError without bits in the target."""
    folds: list[ScaleFold] = []
    for link in block.anatomy.links:
        scale = _search(link, block, io, target, o)
        if scale is not None:
            folds.append(ScaleFold(link, scale))
    return folds


_Judge = Callable[[Tensor], float]


def _search(link: Link, block: BlockView, io: BlockIO, target: Target, o: Options) -> Tensor | None:
    stats = io.stats.get(link.site)
    if stats is None or stats.count == 0:
        return None
    target = known.fitting(target, stats.width)
    grid_of = known.from_target(target)
    readers: dict[str, SiteStats] = {}
    square = torch.zeros(stats.width, dtype=torch.float64)
    for name in link.readers:
        linear = block.anatomy.linear(name)
        own = io.stats.get(linear.site, stats)
        if name not in block.weights or linear.role == "router" or not own.count:
            continue
        square += block.weights[name].square().sum(0, dtype=torch.float64).cpu()
        readers[name] = own
    if not readers:
        return None
    mixed = not all(block.anatomy.linear(name).role in _TOKENWISE for name in readers)
    if mixed and o.outputs == "block":
        judge = _through(readers, block, io, target, grid_of, o)
    else:
        judge = _alone(readers, block, grid_of, o)
    flat = torch.ones(stats.width, device=block.weights[next(iter(readers))].device)
    best, least = flat, judge(flat)
    enough = (1 - o.gain) * least
    spread = link.tie(square.sqrt().to(flat), "mean").clamp(min=1e-12)
    for exponent in (0.25, 0.5, 0.75, 1.0) if o.even else ():
        best, least = _better(_centred(spread.pow(-exponent)), best, least, judge)
    start = best
    size = link.tie(stats.need("absmean"), "mean")
    # Where nothing ever enters, no scale changes anything, and there is no strong input to find.
    for i in range(1, o.grid if bool(size.any()) else 1):
        best, least = _better(_centred(start * size.pow(i / o.grid)), best, least, judge)
    return None if best is flat or least > enough else best


def _alone(readers: Mapping[str, SiteStats], block: BlockView, grid_of: Format, o: Options) -> _Judge:
    """Each reader by its own outputs: the error that `judge` names, summed."""
    costs: dict[str, Tensor] = {}
    judged: list[tuple[Tensor, Tensor]] = []
    for name, stats in readers.items():
        site = block.anatomy.linear(name).site
        if site not in costs:
            costs[site] = stats.need("gram") if o.judge == "rounding" else _price(stats.need("gram"), o)
        weight = block.weights[name]
        judged.append((weight[:: max(1, weight.shape[0] // o.rows) if o.rows else 1], costs[site]))
    return lambda scale: _error(judged, scale, grid_of, o)


def _through(
    readers: Mapping[str, SiteStats], block: BlockView, io: BlockIO, target: Target, grid_of: Format, o: Options
) -> _Judge:
    """All readers together by what reaches the block's output, each as the later step would make it."""
    if io.movement is None:
        raise RuntimeError("a block's output was asked for without calibration samples")
    movement = io.movement
    later = gptq.Options(damping=o.damping, search=o.search, steps=o.steps)

    def compressed(name: str, stats: SiteStats, scale: Tensor) -> Tensor:
        scaled = block.weights[name] * scale
        if o.judge == "sweep":
            return gptq.compress(Layer(name, scaled), stats.scaled(1.0 / scale), target, later).decode() / scale
        grid = _fit(scaled, stats.need("gram").diagonal() / scale.square(), grid_of, o)
        return grid_of.decode(grid_of.encode(scaled, grid), grid) / scale

    return lambda scale: movement({name: compressed(name, stats, scale) for name, stats in readers.items()})


def _price(gram: Tensor, o: Options) -> Tensor:
    """What the sweep pays for a squared rounding error of each column: R_jj^2 [in]."""
    order = gram.diagonal().argsort(descending=True, stable=True)
    pivot = obs.factorize(gram, o.damping, order).pivot
    return torch.empty_like(pivot).index_copy_(0, order, pivot.square())


def _centred(scale: Tensor) -> Tensor:
    scale = (scale / scale.max()).clamp(min=1e-4).float()
    return scale / (scale.max() * scale.min()).sqrt()


def _better(scale: Tensor, best: Tensor, least: float, judge: _Judge) -> tuple[Tensor, float]:
    error = judge(scale)
    return (scale, error) if error < least else (best, least)


def _fit(scaled: Tensor, price: Tensor, grid_of: Format, o: Options) -> Any:
    return ranged.fit(grid_of, scaled, price if o.search == "mse" else None, ranged.RangeRule(o.search, o.steps))


def _error(readers: Sequence[tuple[Tensor, Tensor]], scale: Tensor, grid_of: Format, o: Options) -> float:
    """The error that `judge` names, summed over readers (weight [out, in], Gram matrix [in, in] or price [in])."""
    total = 0.0
    for weight, cost in readers:
        scaled = weight * scale
        price = (cost.diagonal() if cost.dim() == 2 else cost) / scale.square()
        grid = _fit(scaled, price, grid_of, o)
        miss = scaled.sub_(grid_of.decode(grid_of.encode(scaled, grid), grid))
        if cost.dim() == 2:
            miss.div_(scale)
            total += float(((miss @ cost) * miss).sum(dtype=torch.float64))
        else:
            total += float((miss.square().sum(0) * price).sum(dtype=torch.float64))
    return total


def takes(run: Run, linears: Sequence[Linear], o: Options) -> Cost:
    """A trial quantization of the rows that are looked at; beside it a Gram matrix's factor for the sweep, or two
    samples in the block and whole linears under GPTQ."""
    trial = 6 * 4 * max(min(o.rows or x.out_features, x.out_features) * x.in_features for x in linears)
    factor = 2 * 4 * max(x.in_features for x in linears) ** 2 if o.judge == "sweep" else 0
    if o.outputs == "linears":
        return Cost(ram=max(trial, factor))
    mixed = [x for x in linears if x.role not in _TOKENWISE]
    through = peak.of_solving(mixed, gram=o.judge == "sweep").ram if mixed else 0
    states = 2 * run.tokens * (sum(x.out_features for x in linears) + 6 * run.hidden) * 4
    return Cost(ram=max(trial, factor, through + states))


METHOD = Rewrite(
    paper="Lin et al. 2024, arXiv 2306.00978",
    options=Options,
    needs=("gram", "absmean"),
    baseline="rtn",
    covers={
        "awq": [
            {"method": "awq", "target": {"bits": 4}, "options": {"even": False}},
            {"method": "rtn", "target": {"bits": 4}},
        ],
    },
    run=rewrite,
    takes=takes,
)
