"""A named source of text as token windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.data import docs, hub, local
from lilliput.data.tokens import DRAW_CHARACTERS, Tokens, encode, limited, windows
from lilliput.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokens(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    tokens: int,
    seed: int | None = None,
    vocabulary: int | None = None,
) -> Tokens:
    """`samples` windows of `tokens` tokens from a source of text.

    `source`: a .txt or .jsonl file; "docs", "docs:reference" or "docs:library" (see `lilliput.data.docs`);
    "hub:dataset[:config][:split][:column]"; "wikitext2" or "c4", the splits that papers measure on, with another split
    after a colon if that is meant ("wikitext2:train" to calibrate on). The text is tokenized whole, special tokens only
    where the text, the chat template or (at the very start) the tokenizer puts them. Windows are consecutive from the
    first token; with a seed they are drawn from all non-overlapping windows of the first 16 million characters. No
    padding. vocabulary: rows of the embedding that is to read the tokens, None for no check.

    Raises DataError: unknown source, missing or unreadable file, bad row, too little text, a token beyond the
    embedding. The source "self" needs the model: see `generate_tokens`.
    """
    name, pieces = str(source), text_pieces(source, tokenizer)
    return windows(pieces, tokenizer, source=name, samples=samples, tokens=tokens, seed=seed, vocabulary=vocabulary)


def text_pieces(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
    """The text of a source, piece by piece; see `load_tokens`."""
    name = str(source)
    check(name)
    if name in docs.SOURCES:
        return docs.pieces(name)
    return hub.pieces(name, tokenizer) if _hub(name) else local.pieces(Path(name), tokenizer)


def rows(source: str | Path) -> tuple[Iterator[tuple[int, Any]], str | None] | None:
    """Numbered rows of a source that has some, and the column that is meant; None for running text. Raises DataError
    as `load_tokens` does."""
    name = str(source)
    check(name)
    if name in docs.SOURCES or (not _hub(name) and Path(name).suffix != ".jsonl"):
        return None
    return hub.rows(name) if _hub(name) else (local.rows(Path(name)), None)


def used_tokens(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the text of a source, its first 16 million characters taken as a whole. Raises DataError as
    `load_tokens` does, and for no text."""
    ids = encode(tokenizer, "".join(limited(text_pieces(source, tokenizer), DRAW_CHARACTERS)))
    if not ids:
        raise DataError(f"'{source}' holds no text: give some.")
    return ids


def _hub(name: str) -> bool:
    return name.startswith(hub.PREFIX) or hub.is_named(name)


def names_file(source: str | Path) -> bool:
    """Whether a source of text is a file, by its name alone."""
    name = str(source)
    return name != "self" and name not in docs.SOURCES and not _hub(name)


def check(source: str | Path) -> None:
    """Raises DataError for a name that is no source of text, and for a file that is not there or not of a known kind.
    Reads nothing."""
    name = str(source)
    if name == "self":
        raise DataError("'self' is text that the model writes for its own calibration; it cannot be used here.")
    if not names_file(name):
        return
    if Path(name).suffix or Path(name).exists():
        local.check(Path(name))
    else:
        why = " The hub holds the Penn Treebank only as a script, which is not run." if name == "ptb" else ""
        raise DataError(
            f"'{name}' is not a source of text: give {', '.join((*docs.SOURCES, *hub.NAMED))}, self, hub:DATASET, "
            f"or a .txt or .jsonl file.{why}"
        )
