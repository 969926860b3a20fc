"""How much of one set of windows occurs in another: evaluation text that the calibration has seen proves little.

Exact n-grams in numpy: packages that look for near duplicates (MinHash) estimate, and want words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lilliput.data.tokens import Tokens


def _hashes(tokens: Tokens, n: int) -> npt.NDArray[np.uint64]:
    """64-bit hashes of all n-grams within the windows, flat. Equal n-grams have equal hashes; others collide by chance
    once in 2^64 pairs or so."""
    ids = tokens.ids.numpy().astype(np.uint64)
    width = ids.shape[1] - n + 1
    if width < 1:
        return np.empty(0, dtype=np.uint64)
    # splitmix64's finalizer spreads small ids over all bits, so that the sum below cannot collide systematically.
    mixed = ids + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    factors = np.random.default_rng(n).integers(0, 2**64, size=n, dtype=np.uint64) | np.uint64(1)
    total = np.zeros((ids.shape[0], width), dtype=np.uint64)
    for i in range(n):
        total += mixed[:, i : i + width] * factors[i]
    return total.ravel()


def overlap(a: Tokens, b: Tokens, n: int = 13) -> float:
    """Share (0..1) of b's n-grams, counted by position, that occur anywhere in a.

    Both must come from one tokenizer. 13 tokens are the customary length (Brown et al. 2020, arXiv:2005.14165, C.1).
    Windows shorter than n hold no n-gram: the share is then 0.
    """
    reference, hashes = _hashes(a, n), _hashes(b, n)
    return float(np.isin(hashes, reference).mean()) if hashes.size else 0.0


def items_seen(a: Tokens, items: Sequence[Sequence[int]], n: int = 13) -> list[bool]:
    """For each item (token ids of any length) whether any of its n-grams occurs anywhere in a.

    Items shorter than n hold no n-gram and count as not seen.
    """
    reference = np.unique(_hashes(a, n))
    flags = []
    for ids in items:
        hashes = _hashes(Tokens.of(torch.tensor([list(ids)], dtype=torch.int64), "item"), n)
        flags.append(bool(np.isin(hashes, reference, assume_unique=False).any()))
    return flags
