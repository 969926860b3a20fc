"""Text to train on: rows of tokens of equal length, and which of them count."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lilliput.data.load import load_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Lessons:
    """ids: int64 [N, T]; counts: bool [N, T], the tokens that are to be foretold, never the first of a row; positions:
    int64 [N, T], which begin anew with each document of a row, None: each row is one stretch of text."""

    ids: Tensor
    counts: Tensor
    positions: Tensor | None
    source: str
    fingerprint: str

    @staticmethod
    def of(ids: Tensor, counts: Tensor, positions: Tensor | None, source: str) -> Lessons:
        """Wraps the tensors and takes their fingerprint."""
        digest = hashlib.sha256()
        for x in (ids, counts, *(() if positions is None else (positions,))):
            digest.update(repr(tuple(x.shape)).encode())
            digest.update(x.contiguous().numpy().tobytes())
        return Lessons(ids, counts, positions, source, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.ids)


def whole(ids: Tensor, source: str) -> Lessons:
    """Windows int64 [N, T] of running text, of which every token but the first counts."""
    counts = torch.ones_like(ids, dtype=torch.bool)
    counts[:, 0] = False
    return Lessons.of(ids, counts, None, source)


def read(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    tokens: int,
    seed: int | None = None,
    vocabulary: int | None = None,
) -> Lessons:
    """`samples` rows of `tokens` tokens of a source of text, as `load_tokens` reads it. Raises DataError."""
    found = load_tokens(source, tokenizer, samples=samples, tokens=tokens, seed=seed, vocabulary=vocabulary)
    return whole(found.ids, found.source)
