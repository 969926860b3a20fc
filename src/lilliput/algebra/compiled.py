"""Searches among many candidates, compiled by numba: the same results as in torch, in a twentieth of the time or less.

Each weight has hundreds or thousands of candidates, and their costs stay in the first cache when one thread goes
through all of them; torch goes through memory for each operation. Sums and comparisons are the same, one by one, so the
results are too (no fused multiply-add, ties go to the smaller index).

Two more functions go through a block of columns in `algebra.ldlq`'s way, feedback included: rows do not interact there,
so each thread takes rows of its own through all columns, and nobody waits. Their sums of feedback are in the order of
the columns, those of torch in its own, so that codes may differ where two are as near.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEMORY = 190 << 20  # bytes that numba and its compiler take (measured)
NEVER = 1e30  # the cost of what cannot be; finite, so that nothing becomes NaN
_EXACT = {"nnan", "nsz"}  # lets comparisons be vectorized; sums are neither reordered nor fused
_LANES = 32  # vectors of E8 that a thread compares side by side


def available() -> bool:
    """Whether numba is installed (the extra `fast`)."""
    return importlib.util.find_spec("numba") is not None


def best_path(x: Tensor, numbers: Tensor, steps: tuple[int, int]) -> Tensor:
    """`trellis.in_torch` for finite sequences float32 [n, length] on the CPU; numbers float32 [2^window]."""
    path = np.zeros(x.shape, dtype=np.int64)
    if x.numel():
        match_threads()
        _paths(_window(numbers), steps)(x.contiguous().numpy(), numbers.numpy(), path)
    return torch.from_numpy(path)


def settle_paths(numbers: Tensor, steps: tuple[int, int], walk: int, scale: Tensor, *block: Tensor) -> None:
    """`ldlq.Settle` by walks of `walk` rows, each of which begins at register 0; scale float32 [out], all on the CPU.

    What is aimed at must be finite.
    """
    match_threads()
    _settle_paths(_window(numbers), steps)(numbers.numpy(), walk, scale.contiguous().numpy(), *_shared(*block))


def nearest_e8(x: Tensor, patterns: Tensor) -> Tensor:
    """`e8.in_torch` for finite vectors float32 [n, 8] on the CPU; patterns float32 [256, 8]."""
    entry = np.zeros(len(x), dtype=np.int64)
    match_threads()
    _points()(x.T.contiguous().numpy(), *_known(patterns), entry)
    return torch.from_numpy(entry)


def settle_e8(patterns: Tensor, table: Tensor, scale: Tensor, *block: Tensor) -> None:
    """`ldlq.Settle` by points of E8P; table float32 [65536, 8], scale float32 [out], all on the CPU. A code is the
    point's entry number times 8 and the row's place within it. What is aimed at must be finite."""
    match_threads()
    _settle_points()(*_known(patterns), table.numpy(), scale.contiguous().numpy(), *_shared(*block))


def _shared(aim: Tensor, weight: Tensor, coupling: Tensor, codes: Tensor, deviation: Tensor) -> list[Any]:
    """A block as arrays; the last two share the tensors' memory, for they are written."""
    return [*(x.contiguous().numpy() for x in (aim, weight, coupling)), codes.numpy(), deviation.numpy()]


def _window(numbers: Tensor) -> int:
    return len(numbers).bit_length() - 1


def _known(patterns: Tensor) -> tuple[Any, Any, Any]:
    """The patterns, their squared norms and their sums."""
    codebook = patterns.numpy()
    return codebook, (codebook * codebook).sum(1), codebook.sum(1)


def _numba() -> Any:
    return importlib.import_module("numba")


def _jit(function: Callable[..., None]) -> Any:
    return _numba().njit(boundscheck=False, error_model="numpy", fastmath=_EXACT)(function)


def parallel(function: Callable[..., None]) -> Callable[..., None]:
    compiled: Callable[..., None] = _numba().njit(parallel=True, boundscheck=False, error_model="numpy")(function)
    return compiled


def match_threads() -> None:
    """As many as torch has; its own sleep meanwhile. The first call starts numba's threads, which would give torch,
    where both share OpenMP, another number of them."""
    numba, wanted = _numba(), torch.get_num_threads()
    count = min(wanted, numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != count:
        numba.set_num_threads(count)
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)


@functools.cache
def _feed() -> Any:
    """A column [out] plus the deviation of an earlier one times its coupling."""

    def feed(value: Any, before: Any, by: Any) -> None:
        for n in range(len(value)):
            value[n] += before[n] * by

    return _jit(feed)


@functools.lru_cache(maxsize=8)
def _viterbi(window: int, steps: tuple[int, int]) -> Any:
    """Viterbi's algorithm for one sequence x [length]; `work` float32 [2, states] and `least` float32 [length, part]
    are room to work in, `path` [length] is written.

    `least[t]` holds the costs of getting to a register before step t shifts its bits in: what the walk back needs of
    all other costs is computed again, which is less than to remember where each minimum was.
    """
    states = 1 << window

    def repeat_of(part: int, many: int) -> Any:
        def repeat(least: Any, spread: Any) -> None:
            for j in range(part):
                for i in range(many):
                    spread[j * many + i] = least[j]

        return _jit(repeat)

    def least_of(part: int, first: int, last: int) -> Any:
        def lower(numbers: Any, x: Any, spread: Any, least: Any) -> None:
            # A register's predecessors differ in the bits that fall out at its top; its successors lie side by side.
            for j in range(part):
                apart = numbers[first * part + j] - x
                best = apart * apart + spread[first * part + j]
                for top in range(first + 1, last):
                    apart = numbers[top * part + j] - x
                    cost = apart * apart + spread[top * part + j]
                    best = cost if cost < best else best
                if first:
                    best = least[j] if least[j] < best else best
                least[j] = best

        return _jit(lower)

    def step_of(bits: int) -> Any:
        many, part = 1 << bits, states >> bits
        # More than 16 predecessors in one go are not made into vector instructions.
        in_one = many <= 16
        below = least_of(part, 0, min(many, 16))
        above = below if in_one else least_of(part, 16, many)
        # More than 8 copies side by side are slow in one go (by the code that LLVM makes of it), quick in two.
        at_once = bits < 4
        first, then = repeat_of(part, many if at_once else 4), repeat_of(4 * part, many // 4)

        def step(numbers: Any, x: Any, spread: Any, room: Any, least: Any) -> None:
            below(numbers, x, spread, least)
            if not in_one:
                above(numbers, x, spread, least)
            if at_once:
                first(least, spread)
            else:
                first(least, room)
                then(room, spread)

        return _jit(step)

    low, high = steps
    even, odd = step_of(low), step_of(high)

    def viterbi(x: Any, numbers: Any, work: Any, least: Any, path: Any) -> None:
        length, spread = len(x), work[0]
        for s in range(states):
            spread[s] = np.float32(0.0) if s < 1 << low else np.float32(NEVER)
        for j in range(states >> low):
            least[0, j] = np.float32(NEVER) if j else np.float32(0.0)
        for t in range(1, length):
            if t % 2:
                odd(numbers, x[t - 1], spread, work[1], least[t])
            else:
                even(numbers, x[t - 1], spread, work[1], least[t])
        state, best = 0, np.float32(np.inf)
        for s in range(states):
            apart = numbers[s] - x[length - 1]
            cost = apart * apart + spread[s]
            if cost < best:
                state, best = s, cost
        for t in range(length - 1, 0, -1):
            path[t] = state
            bits, before = (high, low) if t % 2 else (low, high)
            rest, part = state >> bits, states >> bits
            best = np.float32(np.inf)
            for top in range(1 << bits):
                s = top * part + rest
                apart = numbers[s] - x[t - 1]
                cost = apart * apart + least[t - 1, s >> before]
                if cost < best:
                    state, best = s, cost
        path[0] = state

    return _jit(viterbi)


@functools.lru_cache(maxsize=8)
def _paths(window: int, steps: tuple[int, int]) -> Callable[..., None]:
    prange, viterbi = _numba().prange, _viterbi(window, steps)
    states, part = 1 << window, (1 << window) >> min(steps)

    def paths(x: Any, numbers: Any, path: Any) -> None:
        count, length = x.shape
        for n in prange(count):
            work, least = np.empty((2, states), np.float32), np.empty((length, part), np.float32)
            viterbi(x[n], numbers, work, least, path[n])

    return parallel(paths)


@functools.lru_cache(maxsize=8)
def _settle_paths(window: int, steps: tuple[int, int]) -> Callable[..., None]:
    prange, viterbi, feed = _numba().prange, _viterbi(window, steps), _feed()
    states, part = 1 << window, (1 << window) >> min(steps)

    def settle(
        numbers: Any, walk: Any, scale: Any, aim: Any, weight: Any, coupling: Any, codes: Any, deviation: Any
    ) -> None:
        count, rows = aim.shape
        for piece in prange(-(-rows // walk)):
            a = piece * walk
            b = min(a + walk, rows)
            work, least = np.empty((2, states), np.float32), np.empty((walk, part), np.float32)
            path, value, x = np.empty(walk, np.int64), np.empty(b - a, np.float32), np.zeros(walk, np.float32)
            for j in range(count):
                value[:] = aim[j, a:b]
                for i in range(j):
                    feed(value, deviation[i, a:b], coupling[i, j])
                for n in range(b - a):
                    x[n] = value[n] / scale[a + n]
                viterbi(x, numbers, work, least, path)
                for n in range(b - a):
                    codes[j, a + n] = np.int32(path[n])
                    deviation[j, a + n] = weight[j, a + n] - numbers[path[n]] * scale[a + n]

    return parallel(settle)


@functools.cache
def _point() -> Any:
    """The best of 512 candidates for each of `_LANES` vectors x [8, _LANES], which lie side by side; see `algebra.e8`.
    All but `x` and the three of the patterns is room to work in, [_LANES] (`size`: [8, _LANES]); `entry` is written."""
    lanes = _LANES

    def best_of_all(
        size: Any, odd: Any, norm: Any, patterns: Any, square: Any, total: Any, score: Any, chosen: Any
    ) -> None:
        for n in range(lanes):
            score[n] = np.float32(-np.inf)
        for k in range(len(patterns)):
            # Written out, so that nothing but the vectors' entries comes from memory.
            p0, p1, p2, p3 = patterns[k, 0], patterns[k, 1], patterns[k, 2], patterns[k, 3]
            p4, p5, p6, p7 = patterns[k, 4], patterns[k, 5], patterns[k, 6], patterns[k, 7]
            even, least = np.int32(total[k]) & 1, square[k]
            for n in range(lanes):
                a, b, c, d = size[0, n] * p0, size[1, n] * p1, size[2, n] * p2, size[3, n] * p3
                e, f, g, h = size[4, n] * p4, size[5, n] * p5, size[6, n] * p6, size[7, n] * p7
                gain = ((((((a + b) + c) + d) + e) + f) + g) + h
                weakest = min(min(min(a, b), min(c, d)), min(min(e, f), min(g, h)))
                worth = np.float32(2.0) * gain - least
                worth -= np.float32(4.0) * weakest if odd[n] != even else np.float32(0.0)
                worth -= norm[n]
                more = worth > score[n]
                score[n] = worth if more else score[n]
                chosen[n] = np.int32(k) if more else chosen[n]

    try_all: Any = _jit(best_of_all)

    def point(
        x: Any,
        patterns: Any,
        square: Any,
        total: Any,
        size: Any,
        odd: Any,
        chosen: Any,
        score: Any,
        best: Any,
        norm: Any,
        entry: Any,
    ) -> None:
        for shift in range(2):
            move = np.float32(0.25) if shift else np.float32(-0.25)
            for n in range(lanes):
                norm[n], odd[n] = np.float32(0.0), 0
            for i in range(8):
                for n in range(lanes):
                    y = x[i, n] + move
                    size[i, n] = abs(y)
                    norm[n] += y * y
                    odd[n] ^= np.int32(y < 0)
            try_all(size, odd, norm, patterns, square, total, score, chosen)
            for n in range(lanes):
                if shift and not score[n] > best[n]:
                    continue
                best[n] = score[n]
                k, flip, bits = chosen[n], 0, 0
                for i in range(8):
                    if size[i, n] * patterns[k, i] < size[flip, n] * patterns[k, flip]:
                        flip = i
                wrong = odd[n] != (np.int32(total[k]) & 1)
                for i in range(7):
                    negative = (x[i, n] + move < 0) != (wrong and i == flip)
                    bits |= int(negative) << (i + 1)
                entry[n] = k * 256 + bits + shift

    return _jit(point)


@functools.cache
def _points() -> Callable[..., None]:
    prange, point, lanes = _numba().prange, _point(), _LANES

    def points(x: Any, patterns: Any, square: Any, total: Any, entry: Any) -> None:
        count = x.shape[1]
        for part in prange(-(-count // lanes)):
            a = part * lanes
            here = min(lanes, count - a)
            vectors, found = np.zeros((8, lanes), np.float32), np.empty(lanes, np.int64)
            size, norm = np.empty((8, lanes), np.float32), np.empty(lanes, np.float32)
            odd, chosen = np.empty(lanes, np.int32), np.zeros(lanes, np.int32)
            score, best = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
            vectors[:, :here] = x[:, a : a + here]
            point(vectors, patterns, square, total, size, odd, chosen, score, best, norm, found)
            entry[a : a + here] = found[:here]

    return parallel(points)


@functools.cache
def _settle_points() -> Callable[..., None]:
    prange, point, feed, lanes = _numba().prange, _point(), _feed(), _LANES

    def settle(
        patterns: Any,
        square: Any,
        total: Any,
        table: Any,
        scale: Any,
        aim: Any,
        weight: Any,
        coupling: Any,
        codes: Any,
        deviation: Any,
    ) -> None:
        count, rows = aim.shape
        for part in prange(-(-rows // (8 * lanes))):
            a = part * 8 * lanes
            b = min(a + 8 * lanes, rows)
            vectors, found = np.zeros((8, lanes), np.float32), np.empty(lanes, np.int64)
            size, norm = np.empty((8, lanes), np.float32), np.empty(lanes, np.float32)
            odd, chosen = np.empty(lanes, np.int32), np.zeros(lanes, np.int32)
            score, best = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
            value = np.empty(b - a, np.float32)
            for j in range(count):
                value[:] = aim[j, a:b]
                for i in range(j):
                    feed(value, deviation[i, a:b], coupling[i, j])
                for n in range(b - a):
                    vectors[n % 8, n // 8] = value[n] / scale[a + n]
                point(vectors, patterns, square, total, size, odd, chosen, score, best, norm, found)
                for n in range(b - a):
                    entry = found[n // 8]
                    codes[j, a + n] = np.int32(entry * 8 + n % 8)
                    deviation[j, a + n] = weight[j, a + n] - table[entry, n % 8] * scale[a + n]

    return parallel(settle)
