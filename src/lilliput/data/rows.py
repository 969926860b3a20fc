"""One row of a data set as text: plain text, a chat, or an instruction with its answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lilliput.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWN = "'text'; 'messages' or 'conversations'; 'instruction' with 'output' and perhaps 'input'"
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


def _messages(turns: Any, where: str) -> list[dict[str, str]]:
    """Turns as role and content, from either {role, content} or {from, value}."""
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: a chat is a non-empty list of turns, not {type(turns).__name__}.")
    messages = []
    for turn in turns:
        role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{where}: each turn of a chat needs text under 'role' and 'content' (or 'from' and 'value')."
            )
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages


def chat(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str, *, answer: bool = False
) -> str:
    """A chat as the model's template writes it, with `answer` up to where the model's answer begins.

    Raises DataError, led by `where`, where the template fails.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    # A template is a program that came with the model: it can raise whatever an expression can.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{where}: the model's chat template refuses this chat: {reason}") from None
    return str(text)


def _instruction(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, bool]:
    fields = [row["instruction"], row.get("input") or "", row["output"]]
    if not all(isinstance(x, str) for x in fields):
        raise DataError(f"{where}: 'instruction', 'input' and 'output' must be text.")
    ask = "\n\n".join(x for x in fields[:2] if x)
    if tokenizer.chat_template is None:
        return f"{ask}\n\n{fields[2]}", False
    messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": fields[2]}]
    return chat(messages, tokenizer, where), True


def _render(row: Any, tokenizer: PreTrainedTokenizerBase, where: str, column: str | None) -> tuple[str, bool]:
    """Text of a row, and whether the chat template made it (then it carries its own separators)."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row is an object with fields, not {type(row).__name__}.")
    if column is not None and column not in row:
        raise DataError(f"{where}: there is no column '{column}', only {', '.join(map(repr, row))}.")
    name = column or next((x for x in ("text", "messages", "conversations") if x in row), None)
    if name is None:
        if "instruction" in row and "output" in row:
            return _instruction(row, tokenizer, where)
        raise DataError(f"{where}: fields {', '.join(map(repr, row)) or 'none'}; known are {KNOWN}.")
    value = row[name]
    if isinstance(value, str):
        return value, False
    if name == "text":
        raise DataError(f"{where}: '{name}' must be text, not {type(value).__name__}.")
    messages = _messages(value, where)
    if tokenizer.chat_template is None:
        raise DataError(f"{where}: this is a chat, but the model has no chat template: give rows with 'text'.")
    return chat(messages, tokenizer, where), True


def conversation(row: Any, where: str, column: str | None) -> list[dict[str, str]] | None:
    """The turns of a row that is a chat, or an instruction with its answer; None for plain text. Raises DataError."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row is an object with fields, not {type(row).__name__}.")
    name = column or next((x for x in ("text", "messages", "conversations") if x in row), None)
    if name is not None:
        value = row.get(name)
        return None if name == "text" or isinstance(value, str) else _messages(value, where)
    if "instruction" not in row or "output" not in row:
        return None
    fields = [row["instruction"], row.get("input") or "", row["output"]]
    if not all(isinstance(x, str) for x in fields):
        raise DataError(f"{where}: 'instruction', 'input' and 'output' must be text.")
    ask = "\n\n".join(x for x in fields[:2] if x)
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": fields[2]}]


def plain(row: Any, tokenizer: PreTrainedTokenizerBase, where: str, column: str | None) -> str:
    """The text of a row. Raises DataError."""
    return _render(row, tokenizer, where, column)[0]


def render(
    rows: Iterable[tuple[int, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    column: str | None = None,
    joint: str | None = None,
) -> Iterator[str]:
    """Numbered rows as pieces of one text. Plain rows are parted by a blank line, templated ones as the template does;
    empty rows are left out. With a `joint` the text is `joint.join(rows)`, empty rows included.

    Raises DataError that names the row and the fields that are known.
    """
    first = True
    for number, row in rows:
        text, templated = _render(row, tokenizer, f"row {number} of '{source}'", column)
        if text or joint is not None:
            yield text if first or templated else ("\n\n" if joint is None else joint) + text
            first = False
