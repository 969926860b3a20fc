"""Text to train on: rows of tokens of equal length, and which of them count."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lilliput.data import load
from lilliput.data.documents import documents, is_chat, pack, shares
from lilliput.data.tokens import MARGIN, Tokens, check_ids, encode, limited
from lilliput.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Lessons:
    """ids: int64 [N, T]; counts: bool [N, T], the tokens that are to be foretold, never the first of a row; positions:
    int64 [N, T], which begin anew with each document of a row, None: each row is one stretch of text; domains: the
    names of the sources of which rows were mixed, and `domain` int64 [N] the number of each row's, both empty or None
    where there is one source."""

    ids: Tensor
    counts: Tensor
    positions: Tensor | None
    source: str
    fingerprint: str
    domains: tuple[str, ...] = ()
    domain: Tensor | None = None

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

    def tokens(self) -> Tokens:
        """The rows as windows, to look for overlap with others."""
        return Tokens(self.ids, self.source, self.fingerprint)

    def tensors(self) -> dict[str, Tensor]:
        """As a file holds them."""
        found = {"ids": self.ids, "counts": self.counts, "positions": self.positions, "domain": self.domain}
        return {name: x.contiguous() for name, x in found.items() if x is not None}

    @staticmethod
    def taken_up(tensors: Mapping[str, Tensor], source: str, domains: Sequence[str]) -> Lessons:
        """From such a file."""
        plain = Lessons.of(tensors["ids"], tensors["counts"], tensors.get("positions"), source)
        return replace(plain, domains=tuple(domains), domain=tensors.get("domain"))


def whole(ids: Tensor, source: str) -> Lessons:
    """Windows int64 [N, T] of running text, of which every token but the first counts."""
    counts = torch.ones_like(ids, dtype=torch.bool)
    counts[:, 0] = False
    return Lessons.of(ids, counts, None, source)


def read(
    source: str | Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    tokens: int,
    apart: bool = False,
    vocabulary: int | None = None,
    own: Callable[[int], Tokens] | None = None,
) -> Lessons:
    """At most `samples` rows of `tokens` tokens: fewer where the text has no more.

    A .txt file and other running text is cut into windows. A .jsonl file or hub set whose rows are chats becomes
    documents, of which answers count; with `apart` so do rows of text, which are parts of one text otherwise. Several
    sources are mixed by weight. `own`: text that the model itself writes, for the source "self". Raises DataError.
    """
    if isinstance(source, str):
        return _one(source, tokenizer, samples, tokens, apart, vocabulary, own)
    parts = [
        _one(name, tokenizer, count, tokens, apart, vocabulary, own)
        for name, count in shares(source, samples).items()
        if count
    ]
    return mixed(parts)


def mixed(parts: Sequence[Lessons]) -> Lessons:
    """Rows of several sources after one another; a domain each."""
    ids, counts = torch.cat([x.ids for x in parts]), torch.cat([x.counts for x in parts])
    positions = None
    if any(x.positions is not None for x in parts):
        flat = torch.arange(ids.shape[1])
        positions = torch.cat([flat.expand_as(x.ids) if x.positions is None else x.positions for x in parts])
    plain = Lessons.of(ids, counts, positions, " + ".join(x.source for x in parts))
    domain = torch.cat([torch.full((len(x),), n) for n, x in enumerate(parts)])
    return replace(plain, domains=tuple(x.source for x in parts), domain=domain)


def _one(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    tokens: int,
    apart: bool,
    vocabulary: int | None,
    own: Callable[[int], Tokens] | None,
) -> Lessons:
    if source == "self":
        if own is None:
            raise DataError("'self' is text that a model writes, and none is at hand that could: name a text.")
        return whole(own(samples).ids, source)
    found = load.rows(source)
    if found is None:
        return _windows(source, tokenizer, samples, tokens, vocabulary)
    rows, column = found
    first = next(rows, None)
    if first is None:
        raise DataError(f"'{source}' holds no text: give some.")
    if not apart and not is_chat(first[1], f"row {first[0]} of '{source}'", column):
        return _windows(source, tokenizer, samples, tokens, vocabulary)
    filler = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    texts = documents(chain([first], rows), tokenizer, source=source, column=column)
    packed = pack(texts, rows=samples, tokens=tokens, filler=filler)
    if not len(packed.ids):
        raise DataError(f"no token of '{source}' counts: give rows with answers, of at least two tokens.")
    check_ids(packed.ids, tokenizer, vocabulary, f"'{source}'")
    alone = bool((packed.positions == torch.arange(tokens)).all())
    return Lessons.of(packed.ids, packed.counts, None if alone else packed.positions, source)


def _windows(
    source: str, tokenizer: PreTrainedTokenizerBase, samples: int, tokens: int, vocabulary: int | None
) -> Lessons:
    """The first windows of running text."""
    most, needed = samples * tokens, 8 * (samples * tokens + MARGIN)
    ids = encode(tokenizer, "".join(limited(load.text_pieces(source, tokenizer), needed)))
    count = min(samples, len(ids) // tokens)
    if not count:
        raise DataError(f"'{source}' holds {len(ids)} tokens, fewer than one sample of {tokens}: give more text.")
    rows = torch.tensor(ids[: min(most, count * tokens)], dtype=torch.int64).view(count, tokens)
    check_ids(rows, tokenizer, vocabulary, f"'{source}'")
    return whole(rows, source)
