"""Searches among many candidates, compiled by numba: the same results as in torch, in a twentieth of the time.

Each weight has hundreds or thousands of candidates, and their costs stay in the first cache when one thread goes
through all of them; torch goes through memory for each operation. Sums and comparisons are the same, one by one, so the
results are too (no fused multiply-add, ties go to the smaller index).
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


def available() -> bool:
    """Whether numba is installed (the extra `fast`)."""
    return importlib.util.find_spec("numba") is not None


def best_path(x: Tensor, numbers: Tensor, steps: tuple[int, int]) -> Tensor:
    """`trellis.in_torch` for finite sequences float32 [n, length] on the CPU; numbers float32 [2^window]."""
    path = np.zeros(x.shape, dtype=np.int64)
    if x.numel():
        window = len(numbers).bit_length() - 1
        _threads()
        _walk(window, steps)(x.contiguous().numpy(), numbers.numpy(), path)
    return torch.from_numpy(path)


def nearest_e8(x: Tensor, patterns: Tensor) -> Tensor:
    """`e8.in_torch` for finite vectors float32 [n, 8] on the CPU; patterns float32 [256, 8]."""
    entry = np.zeros(len(x), dtype=np.int64)
    known = patterns.numpy()
    _threads()
    _points()(x.T.contiguous().numpy(), known, (known * known).sum(1), known.sum(1), entry)
    return torch.from_numpy(entry)


def _numba() -> Any:
    return importlib.import_module("numba")


def _jit(function: Callable[..., None]) -> Any:
    return _numba().njit(boundscheck=False, error_model="numpy", fastmath=_EXACT)(function)


def _parallel(function: Callable[..., None]) -> Callable[..., None]:
    made: Callable[..., None] = _numba().njit(parallel=True, boundscheck=False, error_model="numpy")(function)
    return made


def _threads() -> None:
    """As many as torch has; its own sleep meanwhile."""
    numba = _numba()
    wanted = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != wanted:
        numba.set_num_threads(wanted)


@functools.lru_cache(maxsize=8)
def _walk(window: int, steps: tuple[int, int]) -> Callable[..., None]:
    """Viterbi's algorithm."""
    prange = _numba().prange
    states = 1 << window

    def step_of(bits: int) -> Any:
        many, part = 1 << bits, states >> bits

        def step(before: Any, after: Any, numbers: Any, x: Any, back: Any, least: Any, index: Any) -> None:
            # A register's predecessors differ in the bits that fell out at its top; its successors lie side by side.
            for j in range(part):
                best, where = before[j], np.int32(0)
                for top in range(1, many):
                    cost = before[top * part + j]
                    lower = cost < best
                    where = np.int32(top) if lower else where
                    best = cost if lower else best
                least[j], index[j] = best, where
            for j in range(part):
                back[j] = np.uint8(index[j])
            for j in range(part):
                for i in range(many):
                    apart = numbers[j * many + i] - x
                    after[j * many + i] = apart * apart + least[j]

        return _jit(step)

    low, high = steps
    even, odd, part = step_of(low), step_of(high), states >> min(low, high)

    def walk(x: Any, numbers: Any, path: Any) -> None:
        count, length = x.shape
        for n in prange(count):
            costs = np.empty((2, states), np.float32)
            least, index = np.empty(part, np.float32), np.empty(part, np.int32)
            back = np.empty((length, part), np.uint8)
            costs[0, :] = np.float32(NEVER)
            for s in range(1 << low):
                apart = numbers[s] - x[n, 0]
                costs[0, s] = apart * apart
            for t in range(1, length):
                if t % 2:
                    odd(costs[0], costs[1], numbers, x[n, t], back[t], least, index)
                else:
                    even(costs[1], costs[0], numbers, x[n, t], back[t], least, index)
            last = costs[(length - 1) % 2]
            state = 0
            for s in range(states):
                if last[s] < last[state]:
                    state = s
            for t in range(length - 1, -1, -1):
                path[n, t] = state
                if t:
                    bits = high if t % 2 else low
                    state = (state >> bits) + back[t, state >> bits] * (states >> bits)

    return _parallel(walk)


@functools.cache
def _points() -> Callable[..., None]:
    """The best of 512 candidates for each vector; see `algebra.e8`. Vectors lie side by side, in lanes."""
    prange = _numba().prange
    lanes = 64

    def best_of_all(
        size: Any, odd: Any, norm: Any, patterns: Any, square: Any, total: Any, score: Any, chosen: Any
    ) -> None:
        gain, weakest = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
        score[:] = np.float32(-np.inf)
        for k in range(len(patterns)):
            for n in range(lanes):
                gain[n] = size[0, n] * patterns[k, 0]
                weakest[n] = gain[n]
            for i in range(1, 8):
                for n in range(lanes):
                    term = size[i, n] * patterns[k, i]
                    gain[n] += term
                    weakest[n] = term if term < weakest[n] else weakest[n]
            even = np.int32(total[k]) & 1
            for n in range(lanes):
                wrong = odd[n] != even
                worth = np.float32(2.0) * gain[n] - square[k]
                worth -= np.float32(4.0) * weakest[n] if wrong else np.float32(0.0)
                worth -= norm[n]
                more = worth > score[n]
                score[n] = worth if more else score[n]
                chosen[n] = np.int32(k) if more else chosen[n]

    try_all: Any = _jit(best_of_all)

    def points(x: Any, patterns: Any, square: Any, total: Any, entry: Any) -> None:
        count = x.shape[1]
        for part in prange(-(-count // lanes)):
            first = part * lanes
            here = min(lanes, count - first)
            size, norm = np.zeros((8, lanes), np.float32), np.zeros(lanes, np.float32)
            odd, chosen = np.zeros(lanes, np.int32), np.zeros(lanes, np.int32)
            score, best = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
            for shift in range(2):
                move = np.float32(0.25) if shift else np.float32(-0.25)
                norm[:], odd[:] = 0, 0
                for i in range(8):
                    for n in range(here):
                        y = x[i, first + n] + move
                        size[i, n] = abs(y)
                        norm[n] += y * y
                        odd[n] ^= np.int32(y < 0)
                try_all(size, odd, norm, patterns, square, total, score, chosen)
                for n in range(here):
                    if shift and not score[n] > best[n]:
                        continue
                    best[n] = score[n]
                    k, flip, bits = chosen[n], 0, 0
                    for i in range(8):
                        if size[i, n] * patterns[k, i] < size[flip, n] * patterns[k, flip]:
                            flip = i
                    wrong = odd[n] != (np.int32(total[k]) & 1)
                    for i in range(7):
                        negative = (x[i, first + n] + move < 0) != (wrong and i == flip)
                        bits |= int(negative) << (i + 1)
                    entry[first + n] = k * 256 + bits + shift

    return _parallel(points)
