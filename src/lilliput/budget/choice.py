"""Which option each item takes, so that the summed loss is least and the summed bytes stay within a budget.

This is the multiple-choice knapsack. Where bytes, in units of their greatest common divisor, make a table that is small
enough, dynamic programming finds the best choice exactly. Elsewhere the steps along each item's lower convex hull are
taken by decreasing loss saved for each byte (the Lagrangian's path; Sinha and Zoltners 1979), and what is left is spent
by repair: single items move to whichever option saves most, and pairs trade where that saves more. Equal input gives
equal output.

What misses after the path is less than one step of the hull. Cost: n m log(n m) for n items of m options; the table
takes n m c operations and n c bytes for a room of c units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TABLE = 1 << 25  # entries of the table at most
REPAIRS = 1000  # single moves of a repair at most
_PAIRS = 400  # items among which pairs are tried

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Option:
    """One way to store an item: whatever `key` means to the caller, its bytes, and the loss that it is thought to
    cost."""

    key: int
    bytes: int
    loss: float


@dataclass(frozen=True)
class Item:
    """What shares one option: a linear, or several that an engine fuses, whose bytes and losses are added up."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Choice:
    """For each item the number of its option; the bytes and the loss of all together."""

    picks: tuple[int, ...]
    bytes: int
    loss: float


def smallest(items: Sequence[Item]) -> Choice:
    """The fewest bytes there are; of options with equal bytes the one that loses least."""
    picks = [min(range(len(x.options)), key=lambda j: (x.options[j].bytes, x.options[j].loss, j)) for x in items]
    return _choice(items, picks)


def largest(items: Sequence[Item]) -> Choice:
    """The least loss there is; of options with equal loss the one with fewest bytes."""
    picks = [min(range(len(x.options)), key=lambda j: (x.options[j].loss, x.options[j].bytes, j)) for x in items]
    return _choice(items, picks)


def choose(items: Sequence[Item], budget: int) -> Choice | None:
    """The choice of least summed loss within `budget` bytes; None where not even the smallest fits.

    Raises ValueError for an item without options, or a loss that is not finite.
    """
    for item in items:
        if not item.options or not all(math.isfinite(x.loss) for x in item.options):
            raise ValueError(f"{item.name} has no options, or one whose loss is not finite")
    least, most = smallest(items), largest(items)
    if least.bytes > budget:
        return None
    if most.bytes <= budget:
        return most
    sizes, losses = _arrays(items)
    over = sizes - sizes.min(1, keepdims=True)
    unit = int(np.gcd.reduce(over[np.isfinite(losses)]))
    room = (budget - least.bytes) // max(unit, 1)
    if len(items) * (room + 1) * sizes.shape[1] <= TABLE:
        return _choice(items, _table(over // max(unit, 1), losses, room))
    picks = _path(sizes, losses, np.array(least.picks), budget)
    return _choice(items, _repaired(sizes, losses, picks, budget))


def _choice(items: Sequence[Item], picks: Sequence[int] | Ints) -> Choice:
    taken = [item.options[int(j)] for item, j in zip(items, picks, strict=True)]
    total = math.fsum(x.loss for x in taken)
    return Choice(tuple(int(j) for j in picks), sum(x.bytes for x in taken), total)


def _arrays(items: Sequence[Item]) -> tuple[Ints, Floats]:
    """Bytes and losses [items, options]; shorter rows are filled with options that nobody takes."""
    width = max(len(x.options) for x in items)
    sizes = np.zeros((len(items), width), dtype=np.int64)
    losses = np.full((len(items), width), np.inf)
    for row, item in enumerate(items):
        count = len(item.options)
        sizes[row, :count] = [x.bytes for x in item.options]
        losses[row, :count] = [x.loss for x in item.options]
        sizes[row, count:] = sizes[row, :count].min()
    return sizes, losses


def _table(over: Ints, losses: Floats, room: int) -> list[int]:
    """Exact: the least loss for every number of units, item after item; `over`: units above each item's smallest."""
    best = np.zeros(room + 1)
    taken = np.zeros((len(over), room + 1), dtype=np.int16)
    for row in range(len(over)):
        fresh = np.full(room + 1, np.inf)
        for j in range(over.shape[1]):
            cost, lost = int(over[row, j]), losses[row, j]
            if cost > room or not np.isfinite(lost):
                continue
            with_it = best[: room + 1 - cost] + lost
            better = with_it < fresh[cost:]
            fresh[cost:][better] = with_it[better]
            taken[row, cost:][better] = j
        best = fresh
    at, picks = int(np.argmin(best)), [0] * len(over)
    for row in reversed(range(len(over))):
        picks[row] = int(taken[row, at])
        at -= int(over[row, picks[row]])
    return picks


def _path(sizes: Ints, losses: Floats, start: Ints, budget: int) -> Ints:
    """The smallest choice, moved along the convex hulls by decreasing saving for each byte while the budget lasts.

    A step that does not fit ends its item's way; cheaper ones behind it are still taken.
    """
    steps: list[tuple[float, int, int, int]] = []
    for row in range(len(sizes)):
        hull = _hull(sizes[row], losses[row], int(start[row]))
        for place, (a, b) in enumerate(itertools.pairwise(hull)):
            saved = (losses[row, a] - losses[row, b]) / (sizes[row, b] - sizes[row, a])
            steps.append((-saved, row, place, b))
    picks = start.copy()
    left = budget - int(sizes[np.arange(len(sizes)), picks].sum())
    ended: set[int] = set()
    for _, row, _, to in sorted(steps):
        cost = int(sizes[row, to] - sizes[row, picks[row]])
        if row in ended or cost > left:
            ended.add(row)
            continue
        picks[row], left = to, left - cost
    return picks


def _hull(sizes: Ints, losses: Floats, start: int) -> list[int]:
    """Options on the lower convex hull, from the smallest to the one of least loss, by rising bytes."""
    hull = [start]
    for j in np.lexsort((losses, sizes)):
        if not losses[j] < losses[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(sizes, losses, hull[-2], int(j)) >= _slope(sizes, losses, hull[-2], hull[-1]):
            hull.pop()
        if sizes[j] > sizes[hull[-1]]:
            hull.append(int(j))
    return hull


def _slope(sizes: Ints, losses: Floats, a: int, b: int) -> float:
    """Loss saved for each byte from option a to b."""
    return float((losses[a] - losses[b]) / max(sizes[b] - sizes[a], 1))


def _repaired(sizes: Ints, losses: Floats, picks: Ints, budget: int) -> Ints:
    """Spend what is left: the single move that saves most, again and again, and then trades of two items."""
    rows = np.arange(len(sizes))
    picks = picks.copy()
    left = budget - int(sizes[rows, picks].sum())
    for _ in range(REPAIRS):
        cost = sizes - sizes[rows, picks][:, None]
        saved = np.where(cost <= left, losses[rows, picks][:, None] - losses, -np.inf)
        row, j = divmod(int(np.argmax(saved)), saved.shape[1])
        if saved[row, j] > 0:
            left -= int(cost[row, j])
            picks[row] = j
            continue
        trade = _trade(sizes, losses, picks, left)
        if trade is None:
            break
        for row, j in trade:
            left -= int(sizes[row, j] - sizes[row, picks[row]])
            picks[row] = j
    return picks


def _trade(sizes: Ints, losses: Floats, picks: Ints, left: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Two moves, one that frees bytes and one that takes them, which together save most; None where none saves."""
    rows = np.arange(len(sizes))
    cost = sizes - sizes[rows, picks][:, None]
    saved = losses[rows, picks][:, None] - losses
    frees = np.argwhere((cost < 0) & np.isfinite(losses))
    takes = np.argwhere((saved > 0) & np.isfinite(losses))
    if not len(frees) or not len(takes):
        return None
    # Of the many pairs those that lose least for what they free, and those that save most for what they take.
    given = -saved[frees[:, 0], frees[:, 1]]
    rate = given / -cost[frees[:, 0], frees[:, 1]]
    frees = frees[np.argsort(rate, kind="stable")][:_PAIRS]
    won = saved[takes[:, 0], takes[:, 1]]
    takes = takes[np.argsort(-won / np.maximum(cost[takes[:, 0], takes[:, 1]], 1), kind="stable")][:_PAIRS]
    a, b = frees[:, None, :], takes[None, :, :]
    total = saved[a[..., 0], a[..., 1]] + saved[b[..., 0], b[..., 1]]
    price = cost[a[..., 0], a[..., 1]] + cost[b[..., 0], b[..., 1]]
    total = np.where((price <= left) & (a[..., 0] != b[..., 0]), total, -np.inf)
    n, k = divmod(int(np.argmax(total)), total.shape[1])
    if not total[n, k] > 1e-12 * max(float(np.abs(saved[np.isfinite(saved)]).max()), 1e-300):
        return None
    return (int(frees[n, 0]), int(frees[n, 1])), (int(takes[k, 0]), int(takes[k, 1]))
