"""QLLM: channels with outliers are split into copies, and channels that are alike are merged in their place.

With theta a share of the largest input, channel c becomes n_c = ceil(max|x_c| / theta) copies of x_c / n_c, each with
c's column of weights: exact, and no input exceeds theta. Then as many pairs of other channels are merged as copies were
added: the input is their mean, the column the sum of theirs. Channels that are not split are divided into two sets in
turn; every channel i of the first finds the j of the second of least cost

    d_ij = |(w_i - w_j) / 2|^2 mean (x_i - x_j)^2,

which is the squared error of the output, and the pairs of least cost are merged, no j twice. theta is the one of `grid`
shares 1/grid, 2/grid, ... with the least sum of that cost and of the noise of rounded inputs, s^2 / 12 |What|^2 a token
with the step s = 2 theta / (2^bits - 1). What a later step makes of the linear, it makes of these columns; the copies
and sums are made while the model runs.

Paper: Liu et al. 2024, arXiv 2310.08041.
Cost: a Gram matrix and the inputs' extremes; two gathers a token. Limits: at most `share` of the channels more; the
paper's training of a low-rank correction afterwards is not part of it (`eora` and `lorc` compute one); copies must be
rounded alike, so scales are per token or tensor, not per group; masks do not survive; engines' own layouts do not hold
it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.parts.layer import Layer
from lilliput.parts.reassembled import Reassembled, ReassembledSpec
from lilliput.parts.scheme import Scheme
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target
from lilliput.verbs.compress import Compress


class Options(Strict):
    """See the module's docstring."""

    grid: int = Field(20, ge=1, le=200, description="thresholds tried")
    share: float = Field(0.05, gt=0.0, le=0.3, description="copies added, at most, as a share of the channels")
    input_bits: int = Field(4, ge=2, le=8, description="of the inputs that a later step rounds")


def extra(width: int, o: Options) -> int:
    """Copies added, at most."""
    return min(math.ceil(o.share * width), width // 3)


def scheme(target: Target, o: Options, rows: int, width: int) -> Scheme:
    """No part, one transform."""
    return Scheme(inputs=(ReassembledSpec(extra(width, o)),))


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """The layer with a transform in front. Raises PlanError for a mask, which would not survive it."""
    if layer.support is not None:
        raise PlanError(f"{layer.name} is pruned, and a mask does not survive a transform: leave one of the two out")
    weight, width, most = layer.rest(), stats.width, extra(stats.width, o)
    size, cost = stats.need("absmax").double(), _costs(weight, stats)
    best = _Choice(torch.ones(width, dtype=torch.int64), [])
    least = math.inf
    largest = float(size.max())
    for n in range(o.grid, 0, -1) if largest > 0 else ():
        theta = largest * n / o.grid
        counts = torch.ceil(size / theta * (1 - 1e-9)).clamp(min=1).long().cpu()
        added = int(counts.sum()) - width
        pairs = _matched(cost, counts, added)
        if added > most or pairs is None:
            break
        step = 2 * theta / ((1 << o.input_bits) - 1)
        columns = weight.square().sum(0, dtype=torch.float64).cpu()
        noise = step * step / 12 * float((columns * counts).sum())
        error = noise + sum(float(cost[i, j]) for i, j in pairs)
        if error < least:
            best, least = _Choice(counts, pairs), error
    return layer.between((best.transform(most, stats.need("absmax").device),))


@dataclass(frozen=True)
class _Choice:
    """Copies int64 [width] of each channel, and pairs of channels that are merged."""

    counts: Tensor
    pairs: list[tuple[int, int]]

    def transform(self, most: int, device: torch.device) -> Reassembled:
        width = len(self.counts)
        source = torch.arange(width).repeat_interleave(self.counts)
        partner = {j: i for i, j in self.pairs}
        joined = torch.tensor([c not in partner for c in source.tolist()])
        place = joined.cumsum(0) - 1
        first = {c: k for k, c in reversed(list(enumerate(source.tolist())))}
        for j, i in partner.items():
            place[first[j]] = place[first[i]]
        unused = torch.full((width + most - len(source),), -1)
        origins, places = (torch.cat([x, unused]).to(device, torch.int32) for x in (source, place))
        return Reassembled(origins, places, width)


def _costs(weight: Tensor, stats: SiteStats) -> Tensor:
    """d [width, width], float32 on the CPU."""
    apart = [_distances(weight.T @ weight), _distances(stats.need("gram") / max(stats.count, 1))]
    return apart[0].mul_(apart[1]).div_(4).cpu()


def _distances(gram: Tensor) -> Tensor:
    """Squared distances of what has this Gram matrix."""
    size = gram.diagonal()
    return (size[:, None] + size).sub_(gram, alpha=2).clamp_(min=0)


def _matched(cost: Tensor, counts: Tensor, wanted: int) -> list[tuple[int, int]] | None:
    """Pairs of single channels, none twice; None where there are not enough. Those of the first set that another has
    beaten to their partner look for the next one in another round."""
    single = (counts == 1).nonzero()[:, 0]
    first, second = single[0::2], single[1::2]
    if len(second) < wanted:
        return None
    between = cost[first][:, second]
    pairs: list[tuple[int, int]] = []
    while len(pairs) < wanted:
        least, partner = between.min(1)
        taken: set[int] = set()
        for a in least.argsort(stable=True).tolist():
            b = int(partner[a])
            if b in taken or math.isinf(float(least[a])):
                continue
            taken.add(b)
            pairs.append((int(first[a]), int(second[b])))
            between[a], between[:, b] = torch.inf, torch.inf
            if len(pairs) == wanted:
                break
    return pairs


METHOD = Compress(
    paper="Liu et al. 2024, arXiv 2310.08041",
    options=Options,
    needs=("gram", "absmax"),
    writes="parts",
    covers={
        "qllm": [
            {"method": "qllm"},
            {"method": "gptq", "target": {"bits": 4, "group_size": "channel"}},
            {"method": "act-static-dynamic", "target": {"bits": 4}},
        ],
    },
    run=compress,
    scheme=scheme,
    rowwise=True,
    masked=False,
)
