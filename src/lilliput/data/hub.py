"""Text from the Hugging Face hub, through the optional `datasets` package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lilliput.data.rows import render
from lilliput.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "hub:"


@dataclass(frozen=True)
class Named:
    """A data set that papers report perplexity on. split: the one that they measure on; joint: what they put between
    its rows, empty rows included."""

    dataset: str
    config: str
    split: str
    joint: str


# Cut and joined as the code of GPTQ (Frantar et al. 2023, arXiv:2210.17323) does, which later papers took over.
NAMED: Mapping[str, Named] = {
    "wikitext2": Named("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "\n\n"),
    "c4": Named("allenai/c4", "en", "validation", " "),
}


def _rows(data: Any, source: str) -> Iterator[tuple[int, Any]]:
    rows = enumerate(data, 1)
    while True:
        try:
            numbered = next(rows, None)
        # Streaming meets whatever the network, the reader or the data set's files raise; all mean the same to the user.
        except Exception as error:
            raise DataError(f"'{source}' broke off while being read: {error}") from error
        if numbered is None:
            return
        yield numbered


def _open(source: str, name: str, config: str | None, split: str) -> Any:
    """The streamed rows of a data set."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"'{source}' needs the datasets package: pip install 'lilliput[hub]'.") from None
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # many unrelated classes, from httpx to the package's own; see _rows
        raise DataError(
            f"'{source}' cannot be opened ({type(error).__name__}: {error}). Check the name, configuration and split; "
            "without a network use 'docs' or a local file."
        ) from error


def is_named(source: str) -> bool:
    """Whether this is the short name of a data set, with or without a split after it."""
    return source.partition(":")[0] in NAMED


def dataset(source: str) -> str | None:
    """The id on the hub of the data set that a source of text names; None for text from elsewhere."""
    if is_named(source):
        return NAMED[source.partition(":")[0]].dataset
    return source.removeprefix(PREFIX).partition(":")[0] if source.startswith(PREFIX) else None


def rows(source: str) -> tuple[Iterator[tuple[int, Any]], str | None]:
    """Numbered rows of "hub:dataset[:config][:split][:column]", where the split is "train" by default and an empty
    field is a default, or of a short name "wikitext2[:split]", see `NAMED`; and the column that is meant.

    Rows are streamed: only what is needed is downloaded. Raises DataError: package not installed, data set not
    reachable.
    """
    if is_named(source):
        name, _, split = source.partition(":")
        entry = NAMED[name]
        return _rows(_open(source, entry.dataset, entry.config, split or entry.split), source), "text"
    name, config, split, column, *rest = [*source.removeprefix(PREFIX).split(":"), "", "", ""]
    if not name or any(rest):
        raise DataError(f"'{source}': a hub data set is written hub:dataset[:config][:split][:column].")
    return _rows(_open(source, name, config or None, split or "train"), source), column or None


def pieces(source: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Pieces of the text of `rows`. Raises DataError, also for a bad row."""
    found, column = rows(source)
    joint = NAMED[source.partition(":")[0]].joint if is_named(source) else None
    yield from render(found, tokenizer, source=source, column=column, joint=joint)
