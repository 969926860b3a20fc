"""Tables of levels: the values that a code of few bits can mean, before its scale.

NormalFloat of k bits (QLoRA, arXiv 2305.14314): quantiles of the standard normal distribution, 2^(k-1) positive ones
and 2^(k-1) - 1 negative ones, and 0, divided by the largest. Small floats (OCP 8-bit and Microscaling specifications):
e exponent bits, m mantissa bits, subnormals; +0 and -0 are one level, patterns that mean NaN or infinity are none.
Dynamic tree of k bits (arXiv 2110.02861): after the sign, z zeros and a one mean 10^-z, and the f bits left over say
which of 2^f equal parts of 0.1 .. 1 it is multiplied with the middle of; 0 and 1 take the two patterns left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

_CELLS = 1 << 16  # a longer list would leave the cache; tables with closer levels are searched by bisection


@dataclass(frozen=True)
class Float:
    """A small float: m mantissa bits, exponent `lowest` of its smallest normal, largest value `top`."""

    bits: int
    mantissa: int
    lowest: int
    top: float


FLOATS = {
    "e2m1": Float(4, 1, 0, 6.0),
    "e2m3": Float(6, 3, 0, 7.5),
    "e3m2": Float(6, 2, -2, 28.0),
    "e4m3": Float(8, 3, -6, 448.0),
    "e5m2": Float(8, 2, -14, 57344.0),
}


def normal(bits: int) -> tuple[float, ...]:
    """NormalFloat levels, 2^bits of them, rising from -1 to 1."""
    half = 1 << (bits - 1)
    # Between half a step of the finer and of the coarser side away from certainty: 0.9677083 for 4 bits.
    edge = 1 - 0.5 * (1 / (4 * half) + 1 / (2 * (2 * half - 1)))
    normal_quantile = NormalDist().inv_cdf

    def side(n: int) -> list[float]:
        return [normal_quantile(edge + (0.5 - edge) * i / n) for i in range(n)]

    positive, negative = side(half), side(half - 1)
    top = max(positive)
    return tuple(sorted([0.0, *(x / top for x in positive), *(-x / max(negative) for x in negative)]))


def dynamic(bits: int) -> tuple[float, ...]:
    """Levels of the dynamic tree, 2^bits of them, rising to 1; the lowest lies half a part above -1."""
    magnitudes = [
        10.0**-zeros * (0.1 + 0.9 * (i + 0.5) / parts)
        for zeros in range(bits - 1)
        for parts in [1 << (bits - 2 - zeros)]
        for i in range(parts)
    ]
    return tuple(sorted([0.0, 1.0, *magnitudes, *(-x for x in magnitudes)]))


def floats(kind: Float) -> tuple[float, ...]:
    """All finite values of a small float, rising; one zero."""
    step = 2.0 ** (kind.lowest - kind.mantissa)
    magnitudes = [step * i for i in range(1 << kind.mantissa)]
    while magnitudes[-1] < kind.top:
        at = len(magnitudes)
        scale = 2.0 ** ((at >> kind.mantissa) - 1)
        magnitudes.append(step * scale * ((1 << kind.mantissa) + at % (1 << kind.mantissa)))
    return tuple([-x for x in reversed(magnitudes[1:])] + magnitudes)


MADE: Mapping[str, Callable[[int], tuple[float, ...]]] = {"nf": normal, "dynamic": dynamic}  # of any number of bits


@dataclass(frozen=True, eq=False)
class Table:
    """Rising levels, float32 [K], with 0 among them, on one device.

    `edges` [K]: halfway from each level to the next, infinity after the last.
    `small`: the float that they are all values of, rounded to by its bits. Otherwise the range is cut into cells so
    small that none holds two edges between levels: `first` int64 [cells] counts the edges well below a cell.
    """

    levels: Tensor
    edges: Tensor
    small: Float | None
    first: Tensor | None

    @property
    def top(self) -> float:
        return float(self.levels[-1])

    def snap(self, x: Tensor) -> None:
        """Replace the values of x, float32 of any shape, by the nearest levels; beyond the ends, by the ends.

        Small floats: ties go to the even mantissa, as a cast does. Others: to the lower level.
        """
        if self.small is None:
            torch.index_select(self.levels, 0, self._search(x.reshape(-1)), out=(y := torch.empty_like(x.reshape(-1))))
            x.copy_(y.view(x.shape))
            return
        x.clamp_(-self.small.top, self.small.top)
        exponent = x.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=(self.small.lowest + 127) << 23)
        step = exponent.sub_(self.small.mantissa << 23).view(torch.float32)
        x.div_(step).round_().mul_(step)

    def index(self, x: Tensor) -> Tensor:
        """The index of the level nearest to each value of x, int64 of x's shape; x is left alone."""
        if self.small is None:
            return self._search(x.reshape(-1)).view(x.shape)
        snapped = x.clone(memory_format=torch.contiguous_format)
        self.snap(snapped)
        m, size = self.small.mantissa, snapped.abs()
        normal = (size.view(torch.int32) >> (23 - m)) - ((self.small.lowest + 126) << m)
        below = (size * 2.0 ** (m - self.small.lowest)).to(torch.int32)
        steps = torch.where(size < 2.0**self.small.lowest, below, normal)
        return (torch.where(snapped < 0, -steps, steps) + len(self.levels) // 2).to(torch.int64)

    def _search(self, x: Tensor) -> Tensor:
        if self.first is None:
            return torch.bucketize(x, self.edges[:-1])
        low, span = float(self.levels[0]), float(self.levels[-1]) - float(self.levels[0])
        cell = x.sub(low).mul_(len(self.first) / span).to(torch.int64).clamp_(0, len(self.first) - 1)
        base = torch.index_select(self.first, 0, cell)
        return base.add_(x > torch.index_select(self.edges, 0, base))


@functools.cache
def of(kind: str, bits: int, custom: tuple[float, ...] = (), device: str = "cpu") -> Table:
    """The table called `kind`: a name of MADE or of FLOATS, or "custom" with its own levels."""
    small = FLOATS.get(kind)
    values = floats(small) if small is not None else MADE[kind](bits) if kind in MADE else custom
    levels = torch.tensor(values, dtype=torch.float32)
    edges = (levels[1:].double() + levels[:-1].double()).div(2).float()
    ends = torch.cat([edges, edges.new_tensor([float("inf")])])
    return Table(levels.to(device), ends.to(device), small, None if small else _cells(levels, edges, device))


def _cells(levels: Tensor, edges: Tensor, device: str) -> Tensor | None:
    """Edges below half a cell before each cell. With cells of a third of the closest two edges' distance, none but one
    edge lies between there and half a cell after its end, wherever rounding puts a value."""
    if len(edges) < 2:
        return None
    span = float(levels[-1] - levels[0])
    cells = int(3 * span / float((edges[1:] - edges[:-1]).min())) + 1
    if cells > _CELLS:
        return None
    starts = float(levels[0]) + (torch.arange(cells, dtype=torch.float64) - 0.5) * (span / cells)
    return torch.bucketize(starts, edges.double()).to(device)
