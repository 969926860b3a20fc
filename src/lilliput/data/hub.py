"""Text from the Hugging Face hub, through the optional `datasets` package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lilliput.data.rows import render
from lilliput.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "hub:"


def _rows(data: Any, source: str) -> Iterator[tuple[int, Any]]:
    rows = enumerate(data, 1)
    while True:
        try:
            numbered = next(rows, None)
        # Streaming meets whatever the network, the reader or the data set's files raise; all mean the same to the user.
        except Exception as error:
            raise DataError(f"'{source}' broke off while it was read: {error}") from error
        if numbered is None:
            return
        yield numbered


def pieces(source: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Pieces of "hub:dataset[:config][:split][:column]"; split is "train" by default, an empty field is a default.

    Rows are streamed: only what is needed is downloaded. Raises DataError: package not installed, data set not
    reachable, bad row.
    """
    name, config, split, column, *rest = [*source.removeprefix(PREFIX).split(":"), "", "", ""]
    if not name or any(rest):
        raise DataError(f"'{source}': a hub data set is written hub:dataset[:config][:split][:column].")
    try:
        import datasets
    except ImportError:
        raise DataError(f"'{source}' needs the datasets package: pip install 'lilliput[hub]'.") from None
    try:
        data = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # many unrelated classes, from httpx to the package's own; see _rows
        raise DataError(
            f"'{source}' cannot be opened ({type(error).__name__}: {error}). Check the name, configuration and split; "
            "without a network use 'docs' or a local file."
        ) from error
    yield from render(_rows(data, source), tokenizer, source=source, column=column or None)
