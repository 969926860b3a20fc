"""AWQ: scale up the weights of strong inputs before quantization, so that they are rounded more finely.

For each link (who produces an input -> the linears that read it): m_j = mean |X_j|; for a = 0, 1/n, ..., (n-1)/n:
s = m^a / sqrt(max s * min s), What = Q(W diag(s)) diag(s)^-1; the a of least output error over all readers is kept, and
s folds into the producer. The error is exact over the calibration tokens, from the Gram matrix G of the inputs:
sum over readers of tr((W - What) G (W - What)T). a = 0 is no change, so that error never rises. Inputs that share a
producer row (grouped queries) share the mean of their m.

With `duo` each a is also tried with s = m^a / w^(1-a), w_j = mean over rows of |W_oj| / max of the row.

Paper: Lin et al. 2024, arXiv 2306.00978.
Cost: n * out * in^2 multiply-adds for each reader. Limits: needs verified links; the choice supposes rounding to
nearest, and a later GPTQ gains less from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.anatomy.model import Link
from lilliput.formats.integer import IntegerFormat, from_target
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
        {"method": "awq", "target": {"bits": 4}},
        {"method": "rtn", "target": {"bits": 4}},
    ],
}


class Options(Strict):
    """How the exponent is searched."""

    grid: int = Field(20, ge=2, le=100, description="exponents tried: 0, 1/grid, ..., (grid - 1)/grid")
    duo: bool = Field(False, description="also try scales that even out the weights")
    search: Literal["minmax", "mse"] = Field("mse", description="range of a group in the trial quantization")
    steps: int = Field(8, ge=1, le=200, description="shrink factors of that range search")
    rows: int = Field(0, ge=0, description="judge by so many rows of each linear, evenly spaced (0: all)")


def rewrite(block: BlockView, io: BlockIO, target: Target, o: Options) -> Sequence[ScaleFold]:
    """One fold per link that gains; none where the site saw no tokens. Raises PlanError without bits in the target."""
    grid_of = from_target(target)
    folds: list[ScaleFold] = []
    for link in block.anatomy.links:
        scale = _search(link, block, io, grid_of, o)
        if scale is not None:
            folds.append(ScaleFold(link, scale))
    return folds


def _search(link: Link, block: BlockView, io: BlockIO, grid_of: IntegerFormat, o: Options) -> Tensor | None:
    stats = io.stats.get(link.site)
    if stats is None or stats.count == 0:
        return None
    readers: list[tuple[Tensor, Tensor]] = []
    for name in link.readers:
        linear = block.anatomy.linear(name)
        own = io.stats.get(linear.site, stats)
        if name in block.weights and linear.role != "router" and own.count:
            weight = block.weights[name]
            step = 1 if not o.rows else max(1, weight.shape[0] // o.rows)
            readers.append((weight[::step], own.need("gram")))
    if not readers:
        return None
    best: Tensor | None = None
    least = sum(_error(w, gram, None, grid_of, o) for w, gram in readers)
    for scale in _candidates(link.tie(stats.need("absmean"), "mean"), link, [w for w, _ in readers], o):
        error = sum(_error(w, gram, scale, grid_of, o) for w, gram in readers)
        if error < least:
            best, least = scale, error
    return best


def _candidates(size: Tensor, link: Link, weights: Sequence[Tensor], o: Options) -> Iterator[Tensor]:
    share = None
    if o.duo:
        relative = [w.abs() / w.abs().amax(1, keepdim=True).clamp(min=1e-12) for w in weights]
        share = link.tie(torch.cat(relative).mean(0), "mean")
    for i in range(o.grid):
        alpha = i / o.grid
        if i:
            yield _centred(size.pow(alpha))
        if share is not None:
            yield _centred(size.pow(alpha) / share.pow(1.0 - alpha).clamp(min=1e-4))


def _centred(scale: Tensor) -> Tensor:
    scale = scale.float().clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def _error(weight: Tensor, gram: Tensor, scale: Tensor | None, grid_of: IntegerFormat, o: Options) -> float:
    scaled = weight if scale is None else weight * scale
    size = gram.diagonal() if scale is None else gram.diagonal() / scale.square()
    grid = grid_of.fit(scaled, search=o.search, importance=size if o.search == "mse" else None, steps=o.steps)
    miss = grid_of.decode(grid_of.encode(scaled, grid), grid)
    if scale is not None:
        miss /= scale
    miss = weight - miss
    return float(((miss @ gram) * miss).sum(dtype=torch.float64))
