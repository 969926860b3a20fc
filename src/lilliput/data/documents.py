"""Rows of a data set as documents: their tokens, and which of them are to be foretold; and several in a row.

Of a chat only what the model itself says counts. Where an answer lies is found through the model's chat template alone:
an answer begins where the chat up to it, with the template's words before an answer, no longer agrees with the whole
chat, and ends where the chat that ends with it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.data.rows import chat, conversation, plain
from lilliput.data.tokens import encode
from lilliput.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN = 64  # rows that are not full yet, among which a document looks for a place


@dataclass(frozen=True)
class Document:
    """ids, and whether each counts."""

    ids: Sequence[int]
    counts: Sequence[bool]

    def pieces(self, tokens: int) -> Iterator[Document]:
        """Of so many tokens at most; what follows a cut is a document of its own."""
        for a in range(0, len(self.ids), tokens):
            yield Document(self.ids[a : a + tokens], self.counts[a : a + tokens])


def is_chat(row: Any, where: str, column: str | None) -> bool:
    """Whether a row is a chat, or an instruction with its answer."""
    return conversation(row, where, column) is not None


def documents(
    rows: Iterable[tuple[int, Any]], tokenizer: PreTrainedTokenizerBase, *, source: str, column: str | None
) -> Iterator[Document]:
    """One a row; text ends with the tokenizer's end-of-text token, all of it counts. Raises DataError, which names the
    row."""
    for number, row in rows:
        where = f"row {number} of '{source}'"
        turns = conversation(row, where, column)
        if turns is None:
            ids = encode(tokenizer, plain(row, tokenizer, where, column))
            ids = ids if not ids or tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
            document = Document(ids, [True] * len(ids))
        else:
            document = answered(turns, tokenizer, where)
        if len(document.ids) > 1:
            yield document


def answered(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str) -> Document:
    """A chat, of which the assistant's turns count. Raises DataError where the template does not show where they
    are."""
    if tokenizer.chat_template is None:
        raise DataError(f"{where}: this is a chat, but the model has no chat template: give rows with 'text'.")
    if not tokenizer.is_fast:
        raise DataError(f"{where}: chats need a tokenizer that says where its tokens lie (a fast one).")
    text = chat(turns, tokenizer, where)
    spans = []
    for n, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        asked = chat(turns[:n], tokenizer, where) if n else ""
        start = _common(chat(turns[:n], tokenizer, where, answer=True), text) if n else 0
        end = _common(chat(turns[: n + 1], tokenizer, where), text)
        if start < len(asked) or end <= start:
            raise DataError(
                f"{where}: the chat template writes what comes before turn {n + 1} otherwise once that turn is there, "
                "so that answers cannot be told from questions: give rows with 'text'."
            )
        spans.append((start, end))
    found: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counts = [any(a <= x < b and x < y for a, b in spans) for x, y in found["offset_mapping"]]
    return Document(found["input_ids"], counts)


def _common(a: str, b: str) -> int:
    """Characters in which two texts agree from the start."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True)
class Packed:
    """Rows of documents: ids int64 [N, T], counts bool [N, T], positions int64 [N, T], from 0 in each document."""

    ids: Tensor
    counts: Tensor
    positions: Tensor


def pack(found: Iterable[Document], *, rows: int, tokens: int, filler: int) -> Packed:
    """Documents in as few rows as the first that has room for each makes, at most `rows`; what is left of a row is
    filled, and does not count. The first token of a document never counts: nothing precedes it."""
    held: list[list[Document]] = []
    room: dict[int, int] = {}
    for document in (x for whole in found for x in whole.pieces(tokens)):
        if not any(document.counts[1:]):
            continue  # a piece that is all question teaches nothing
        place = next((n for n, left in room.items() if left >= len(document.ids)), None)
        if place is None:
            if len(held) == rows:
                break
            place = len(held)
            held.append([])
            room[place] = tokens
            if len(room) > OPEN:
                del room[min(room, key=lambda n: room[n])]
        held[place].append(document)
        room[place] -= len(document.ids)
        if not room[place]:
            del room[place]
    ids = torch.full((len(held), tokens), filler, dtype=torch.int64)
    counts = torch.zeros(len(held), tokens, dtype=torch.bool)
    positions = torch.zeros(len(held), tokens, dtype=torch.int64)
    for n, row in enumerate(held):
        at = 0
        for document in row:
            end = at + len(document.ids)
            ids[n, at:end] = torch.tensor(document.ids)
            counts[n, at + 1 : end] = torch.tensor(document.counts[1:], dtype=torch.bool)
            positions[n, at:end] = torch.arange(end - at)
            at = end
        positions[n, at:] = torch.arange(tokens - at)
    return Packed(ids, counts, positions)


def shares(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """How many of `count` rows each source gives, by largest remainder. Raises DataError for weights that are none."""
    total = sum(weights.values())
    if not weights or total <= 0 or min(weights.values()) < 0:
        raise DataError("the weights of texts are numbers of which none is below 0 and one is above: give such.")
    exact = {name: count * x / total for name, x in weights.items()}
    whole = {name: int(x) for name, x in exact.items()}
    for name in sorted(exact, key=lambda n: whole[n] - exact[n])[: count - sum(whole.values())]:
        whole[name] += 1
    return whole
