"""Tokens that configs name by their ids, and the same configs where tokens are numbered anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.errors import PlanError

_SINGLE = ("_token_id", "_token_ids")  # where to begin, to stop, to pad
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
_PLACED = ("forced_decoder_ids", "sequence_bias")


def numbering(kept: Sequence[int]) -> dict[int, int]:
    """New ids by old ones."""
    return {old: new for new, old in enumerate(kept)}


def named_ids(config: Mapping[str, Any]) -> set[int]:
    """The ids of single tokens that a config names: where to begin, to stop, to pad."""
    found: set[int] = set()
    for key, value in config.items():
        if key.endswith(_SINGLE):
            found |= {x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, int)}
    return {x for x in found if x >= 0}


def renumbered(config: Mapping[str, Any], number: Mapping[int, int], rows: int, where: str) -> dict[str, Any]:
    """The entries of a config that name tokens, with their new ids; lists of tokens that are not to be written lose
    those that have left. Raises PlanError, led by `where`, for an id that has left or an entry of another kind.
    Ids beyond the `rows` of the embedding, such as defaults of a class, name nothing and stay."""
    gone = [x for x in sorted(named_ids(config)) if x not in number and x < rows]
    if gone:
        raise PlanError(
            f"{where} names the token {gone[0]}, which the tokenizer does not have: correct the one or other"
        )
    placed = [x for x in _PLACED if config.get(x)]
    if placed:
        raise PlanError(f"{where} has {placed[0]}, whose tokens cannot be renumbered: remove it from the model's files")

    def new(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [new(x) for x in value]
        return value if value is None else number.get(value, value)

    def left(value: Any) -> Any:
        return [[number[y] for y in x] if isinstance(x, list) else number[x] for x in value if _all(x, number)]

    changed = {k: new(x) for k, x in config.items() if k.endswith(_SINGLE)}
    return changed | {k: left(config[k]) for k in _LISTS if config.get(k)}


def _all(value: Any, number: Mapping[int, int]) -> bool:
    return all(x in number for x in (value if isinstance(value, list) else [value]))
