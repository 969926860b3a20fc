"""From pieces of text to windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens near a cut may come out otherwise than in the uncut text; this many are read past the last one used.
MARGIN = 256
# A seeded draw chooses among the windows of at most this much text (4 million tokens, some ten seconds of tokenizing).
DRAW_CHARACTERS = 1 << 24


@dataclass(frozen=True)
class Tokens:
    """Windows of equal length, without padding.

    `ids`: int64 [samples, tokens]; `source`: what the user named; `fingerprint`: sha256 (hex) of shape and ids, so it
    tells text, tokenizer, window length and order apart. The text itself is not kept.
    """

    ids: Tensor
    source: str
    fingerprint: str

    @staticmethod
    def of(ids: Tensor, source: str) -> Tokens:
        """Wraps int64 [samples, tokens] and takes its fingerprint."""
        ids = ids.contiguous()
        digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
        digest.update(ids.numpy().astype("<i8").tobytes())
        return Tokens(ids, source, digest.hexdigest())


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text` taken as a whole: a beginning-of-text token where the tokenizer adds one, and no other additions;
    none for no text.

    The tokenizer's warning about texts longer than the model's context is off: the text is cut into windows later.
    """
    if not text:
        return []
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id
    # Asked of the tokenizer instead of read from a flag: which flag decides differs between tokenizer classes.
    adds_start = start is not None and tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [start]
    return [start, *ids] if adds_start and ids[:1] != [start] else ids


def check_ids(ids: Sequence[int] | Tensor, tokenizer: PreTrainedTokenizerBase, rows: int | None, where: str) -> None:
    """Raises DataError, led by `where`, for the first of token ids beyond an embedding of so many rows (None: any)."""
    if rows is None or not len(ids):
        return
    flat = ids if isinstance(ids, Tensor) else torch.tensor(ids)
    if int(flat.max()) < rows:
        return
    first = int(flat[flat >= rows][0])
    name = tokenizer.convert_ids_to_tokens(first)
    raise DataError(
        f"{where} contains the token {name!r} with the id {first}, but the model's embedding has {rows} rows "
        f"(ids 0 to {rows - 1}): the model was not resized for all tokens of the tokenizer. Resize the model's "
        "embedding and save it again, use the tokenizer with which it was trained, or give text without such tokens."
    )


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) over all tokens and their ids: what is left to compare when a tokenizer is gone from memory."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{number} {len(token)} {token}".encode("utf-8", errors="surrogatepass"))
    return digest.hexdigest()


def same_vocabulary(ours: str, theirs: str, names: str) -> None:
    """Raises DataError where two models' `vocabulary_of` differ; names: of both, for the message."""
    if ours != theirs:
        raise DataError(f"{names} cannot be compared: their tokenizers have different vocabularies.")


def _prefix(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase, needed: int) -> list[int]:
    """At least `needed` ids from the start of the joined pieces, or all there are; reads no more than that takes."""
    text, ended = "", False
    length = 6 * (needed + MARGIN)
    source = iter(pieces)
    while True:
        parts, size = [text], len(text)
        while size < length and not ended:
            piece = next(source, None)
            if piece is None:
                ended = True
            else:
                parts.append(piece)
                size += len(piece)
        text = "".join(parts)
        ids = encode(tokenizer, text)
        if ended or len(ids) >= needed + MARGIN:
            return ids
        length = max(2 * len(text), 1024)


def limited(pieces: Iterable[str], characters: int) -> Iterable[str]:
    """The first pieces, of so many characters or hardly more."""
    for piece in pieces:
        yield piece
        characters -= len(piece)
        if characters <= 0:
            return


def windows(
    pieces: Iterable[str],
    tokenizer: Any,
    *,
    source: str,
    samples: int,
    tokens: int,
    seed: int | None,
    vocabulary: int | None = None,
) -> Tokens:
    """Windows of the joined pieces: the first `samples`, or with a seed that many drawn without replacement.

    Windows are consecutive from the first token and never overlap. A draw keeps the order of the text and chooses
    among the windows of the first 16 million characters. Raises DataError when the text is too short, or holds a token
    beyond an embedding of `vocabulary` rows.
    """
    if samples < 1 or tokens < 1:
        raise DataError(f"{samples} samples of {tokens} tokens: both must be at least 1.")
    needed = samples * tokens
    if seed is None:
        ids = _prefix(pieces, tokenizer, needed)
    else:
        ids = encode(tokenizer, "".join(limited(pieces, DRAW_CHARACTERS)))
    if len(ids) < needed:
        what = "holds no text" if not ids else f"holds {len(ids)} tokens"
        raise DataError(
            f"'{source}' {what}, but {samples} x {tokens} = {needed} tokens are needed: "
            "give more text, or ask for fewer or shorter samples."
        )
    count = len(ids) // tokens
    grid = torch.tensor(ids[: count * tokens], dtype=torch.int64).view(count, tokens)
    if seed is None:
        rows = grid[:samples].clone()
    else:
        generator = torch.Generator().manual_seed(seed)
        rows = grid[torch.randperm(count, generator=generator)[:samples].sort().values]
    check_ids(rows, tokenizer, vocabulary, f"'{source}'")
    return Tokens.of(rows, source)
