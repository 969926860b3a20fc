"""The codebook of QuIP# for two bits a weight: 2^16 points of the lattice E8 + 1/4 (E8P, arXiv 2402.04396).

A point is s * p + t: p one of 256 patterns of eight entries from {1/2, 3/2, 5/2}, s signs such that the sum of s * p is
even, t = +1/4 or -1/4 added to all eight. Entry number, 16 bits: pattern * 256 + sign bits of the first seven entries
(bit i set: negative) * 2 + (1 where t = -1/4). The sign of the eighth follows from the sum.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from lilliput.algebra import compiled

DIMENSION = 8
SPREAD = 1.0315  # rms of a Gaussian source, in units of the codebook, at the scale of least mean square error


@functools.cache
def patterns() -> Tensor:
    """The 256 patterns, float32 [256, 8]: all 227 with squared norm up to 10, then 29 of norm 12.

    The paper takes 29 of the 56 patterns with five entries of 3/2 and does not say which: here the first in the order
    of itertools.combinations over the places of the five.
    """

    def pattern(large: tuple[int, ...], largest: int | None = None) -> list[float]:
        return [2.5 if i == largest else 1.5 if i in large else 0.5 for i in range(DIMENSION)]

    rows = [pattern(c) for k in range(5) for c in itertools.combinations(range(DIMENSION), k)]
    rows += [pattern((), i) for i in range(DIMENSION)]
    rows += [pattern((j,), i) for i in range(DIMENSION) for j in range(DIMENSION) if i != j]
    rows += [pattern(c) for c in itertools.islice(itertools.combinations(range(DIMENSION), 5), 256 - len(rows))]
    return torch.tensor(rows)


@functools.cache
def table() -> Tensor:
    """All points by entry number, float32 [65536, 8]; do not write into it."""
    index = torch.arange(1 << 16)
    absolute = patterns()[index >> 8]
    negative = torch.stack([index >> (i + 1) & 1 for i in range(7)], 1)
    signed = absolute[:, :7] * (1 - 2 * negative)
    # Twice any entry is odd, so one choice of the last sign makes the sum even.
    odd = (signed.sum(1) + absolute[:, 7]).remainder(2) != 0
    last = torch.where(odd, -absolute[:, 7], absolute[:, 7])
    shift = torch.where((index & 1).bool(), -0.25, 0.25)
    return torch.cat((signed, last[:, None]), 1) + shift[:, None]


def nearest(x: Tensor) -> Tensor:
    """Entry numbers of the points nearest to x float32 [n, 8], int64 [n]: the exact minimum over all 65,536.

    For each shift and pattern the best signs are those of x, but for the entry of least |x| p where their sum is odd,
    which costs 4 |x| p: 512 candidates a vector. Compiled code goes through them where there is any, with the same
    result.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and compiled.available():
        return compiled.nearest_e8(x, patterns())
    return in_torch(x, patterns().to(x.device))


def in_torch(x: Tensor, codebook: Tensor) -> Tensor:
    """`nearest` by torch's operations; known: the patterns, on the device of x."""
    square, total = codebook.square().sum(1), codebook.sum(1)
    best: Tensor | None = None
    chosen: Tensor | None = None
    for shift in (0, 1):
        y = x + (0.25 if shift else -0.25)
        size, negative = y.abs(), y < 0
        # One term after the other, so that sums do not depend on how a product is cut.
        gain, norm = torch.zeros(len(x), len(codebook), dtype=x.dtype, device=x.device), torch.zeros_like(y[:, 0])
        weakest = torch.full_like(gain, torch.inf)
        for i in range(DIMENSION):
            term = size[:, i, None] * codebook[:, i]
            gain += term
            norm += y[:, i] * y[:, i]
            torch.minimum(weakest, term, out=weakest)
        odd = (total + negative.sum(1, keepdim=True)).remainder(2) != 0
        gain = gain.mul_(2).sub_(square).sub_(weakest.mul_(4).mul_(odd)).sub_(norm[:, None])
        score, pattern = gain.max(1)
        flip = (size * codebook[pattern]).argmin(1)
        wrong = odd.gather(1, pattern[:, None]).squeeze(1)
        signs = negative ^ (torch.nn.functional.one_hot(flip, DIMENSION).bool() & wrong[:, None])
        bits = (signs[:, :7].long() << torch.arange(1, 8, device=x.device)).sum(1)
        index = pattern * 256 + bits + shift
        if best is None or chosen is None:
            best, chosen = score, index
        else:
            chosen = torch.where(score > best, index, chosen)
    assert chosen is not None
    return chosen
