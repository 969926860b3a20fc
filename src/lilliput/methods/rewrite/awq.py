"""AWQ: scale up the weights of strong inputs before quantization, so that they are rounded more finely.

For each link (who produces an input -> the linears that read it): m_j = mean |X_j|; for a = 0, 1/n, ..., (n-1)/n:
s = m^a / sqrt(max s * min s), What = Q(W diag(s)) diag(s)^-1; the a of least error is kept, and s folds into the
producer. A reader's error is exact over the calibration tokens, from the Gram matrix G of the inputs:
e(s) = tr((W - What) G (W - What)T). a = 0 is no change, so the judged error never rises. Inputs that share a producer
row (grouped queries) share the mean of their m.

Several readers are judged, as in the paper's code, by what reaches the block's output: the sum over readers of
b e(s) / e(1), where b is how far the block's output moves with that reader alone rounded, s = 1 (`outputs` "block"; one
measurement for each role, so that experts cost no more). The plain sum of e(s) ("linears") lets large outputs decide
alone: errors of queries, which the softmax softens, hide those of values, which pass through.

Of linears with many outputs only `rows` are looked at: rows agree on the strong inputs, and all of them cost several
times as much (0 does look at all, and only then is the error exact).

Beyond the paper: `even` first tries s = w^-b, b = 1/4 ... 1, with w_j the root mean square of column j over all
readers, which evens out the columns that share a scale, and then the exponents a on top of the best b. `judge` "sweep"
prepares for GPTQ instead of rounding to nearest: the sweep pays R_jj^2 / s_j^2 for the squared rounding error of column
j (`algebra.obs`), so the sum of that is compared; it needs no product with G.

The paper's clip search is the step behind: `rtn` and `gptq` search the range of every group, of q and k too, for the
least error weighted by the inputs' mean squares, which is the diagonal of what the paper compares.

Paper: Lin et al. 2024, arXiv 2306.00978.
Cost: n * min(out, rows) * in^2 multiply-adds for each reader; two batches through the block for each role.
Limits: needs verified links; the choice supposes rounding to nearest, and a later GPTQ gains less from it; queries,
keys and values in one matrix count as one reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.algebra import obs
from lilliput.anatomy.model import Link
from lilliput.formats import ranged
from lilliput.formats.format import Format
from lilliput.formats.known import from_target
from lilliput.methods.fold import ScaleFold
from lilliput.methods.view import BlockIO, BlockView
from lilliput.recipe import Strict, Target

PAPER = "Lin et al. 2024, arXiv 2306.00978"
NEEDS: tuple[str, ...] = ("gram", "absmean")
WRITES: Literal["fold"] = "fold"
ROWWISE = False
BASELINE: str | None = "rtn"
COVERS: Mapping[str, list[dict[str, Any]] | None] = {
    "awq": [
        {"method": "awq", "target": {"bits": 4}, "options": {"even": False}},
        {"method": "rtn", "target": {"bits": 4}},
    ],
}


class Options(Strict):
    """How the scales are searched."""

    grid: int = Field(20, ge=2, le=100, description="exponents of the inputs tried: 0, 1/grid, ..., (grid - 1)/grid")
    even: bool = Field(True, description="also try scales that even out the weights' columns")
    judge: Literal["rounding", "sweep"] = Field("rounding", description="what quantizes later: rtn, or gptq's sweep")
    outputs: Literal["block", "linears"] = Field(
        "block", description="an error counts by what it does to the block's output, or all readers' own outputs alike"
    )
    search: Literal["minmax", "mse"] = Field("mse", description="range of a group in the trial quantization")
    steps: int = Field(8, ge=1, le=200, description="shrink factors of that range search")
    rows: int = Field(256, ge=0, description="judge by so many rows of each linear, evenly spaced (0: all)")
    damping: float = Field(0.01, ge=0.0, le=10.0, description="judge sweep: damping of the sweep to come")


def rewrite(block: BlockView, io: BlockIO, target: Target, o: Options) -> Sequence[ScaleFold]:
    """One fold per link that gains; none where the site saw no tokens. Raises PlanError without bits in the target."""
    grid_of = from_target(target)
    folds: list[ScaleFold] = []
    for link in block.anatomy.links:
        scale = _search(link, block, io, grid_of, o)
        if scale is not None:
            folds.append(ScaleFold(link, scale))
    return folds


@dataclass(frozen=True)
class _Reader:
    """A linear that reads the link's input: what is judged of it [rows, in], what errors cost (Gram matrix [in, in] or
    price [in]), and how much its error counts."""

    name: str
    weight: Tensor
    cost: Tensor
    share: float = 1.0


def _search(link: Link, block: BlockView, io: BlockIO, grid_of: Format, o: Options) -> Tensor | None:
    stats = io.stats.get(link.site)
    if stats is None or stats.count == 0:
        return None
    readers: list[_Reader] = []
    grams: dict[str, Tensor] = {}
    square = torch.zeros(stats.width, dtype=torch.float64)
    for name in link.readers:
        linear = block.anatomy.linear(name)
        own = io.stats.get(linear.site, stats)
        if name not in block.weights or linear.role == "router" or not own.count:
            continue
        weight = block.weights[name]
        square += weight.square().sum(0, dtype=torch.float64).cpu()
        step = 1 if not o.rows else max(1, weight.shape[0] // o.rows)
        if linear.site not in grams:
            grams[linear.site] = own.need("gram") if o.judge == "rounding" else _price(own.need("gram"), o)
        readers.append(_Reader(name, weight[::step], grams[linear.site]))
    if not readers:
        return None
    flat = torch.ones(stats.width, device=readers[0].weight.device)
    if o.outputs == "block":
        readers = _weighed(readers, flat, block, io, grid_of, o)
    best, least = flat, _error(readers, flat, grid_of, o)
    spread = link.tie(square.sqrt().to(flat), "mean").clamp(min=1e-12)
    for exponent in (0.25, 0.5, 0.75, 1.0) if o.even else ():
        best, least = _better(_centred(spread.pow(-exponent)), best, least, readers, grid_of, o)
    start = best
    size = link.tie(stats.need("absmean"), "mean")
    # Where nothing ever enters, no scale changes anything, and there is no strong input to find.
    for i in range(1, o.grid if bool(size.any()) else 1):
        best, least = _better(_centred(start * size.pow(i / o.grid)), best, least, readers, grid_of, o)
    return None if best is flat else best


def _weighed(
    readers: Sequence[_Reader], flat: Tensor, block: BlockView, io: BlockIO, grid_of: Format, o: Options
) -> list[_Reader]:
    """The readers with what an error of theirs moves in the block's output, measured for one role at a time."""
    roles: dict[str, list[_Reader]] = {}
    for reader in readers:
        roles.setdefault(block.anatomy.linear(reader.name).role, []).append(reader)
    if len(roles) == 1:
        return list(readers)  # one share for all changes no choice
    if io.moved is None:
        raise RuntimeError("a block's output was asked for without calibration samples")
    found: list[_Reader] = []
    for some in roles.values():
        rounded = {}
        for reader in some:
            weight = block.weights[reader.name]
            rounded[reader.name] = weight - _miss(weight.clone(), reader.cost, flat, grid_of, o)[0]
        own = _error(some, flat, grid_of, o)
        share = io.moved(rounded) / own if own > 0 else 0.0
        found += [replace(reader, share=share) for reader in some]
    return found


def _price(gram: Tensor, o: Options) -> Tensor:
    """What the sweep pays for a squared rounding error of each column: R_jj^2 [in]."""
    order = gram.diagonal().argsort(descending=True, stable=True)
    pivot = obs.factorize(gram, o.damping, order).pivot
    return torch.empty_like(pivot).index_copy_(0, order, pivot.square())


def _centred(scale: Tensor) -> Tensor:
    scale = (scale / scale.max()).clamp(min=1e-4).float()
    return scale / (scale.max() * scale.min()).sqrt()


def _better(
    scale: Tensor, best: Tensor, least: float, readers: Sequence[_Reader], grid_of: Format, o: Options
) -> tuple[Tensor, float]:
    error = _error(readers, scale, grid_of, o)
    return (scale, error) if error < least else (best, least)


def _miss(scaled: Tensor, cost: Tensor, scale: Tensor, grid_of: Format, o: Options) -> tuple[Tensor, Tensor]:
    """Rounding errors of a scaled weight [out, in], which is overwritten, and the price of each column's squares."""
    price = (cost.diagonal() if cost.dim() == 2 else cost) / scale.square()
    grid = ranged.fit(grid_of, scaled, price if o.search == "mse" else None, ranged.Search(o.search, o.steps))
    return scaled.sub_(grid_of.decode(grid_of.encode(scaled, grid), grid)), price


def _error(readers: Sequence[_Reader], scale: Tensor, grid_of: Format, o: Options) -> float:
    """The error that `judge` names, summed over the readers by their shares."""
    total = 0.0
    for reader in readers:
        miss, price = _miss(reader.weight * scale, reader.cost, scale, grid_of, o)
        if reader.cost.dim() == 2:
            miss.div_(scale)
            error = float(((miss @ reader.cost) * miss).sum(dtype=torch.float64))
        else:
            error = float((miss.square().sum(0) * price).sum(dtype=torch.float64))
        total += reader.share * error
    return total
