"""What a section of the page is made of, beside tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lilliput.report.cells import Table
from lilliput.report.svg import Picture


@dataclass(frozen=True)
class Prose:
    """Paragraphs; with a `tone` (a level of the verdict) in a box of that colour, as a list below `title`."""

    lines: tuple[str, ...]
    tone: str = ""
    title: str = ""


@dataclass(frozen=True)
class Code:
    """Text as it was written."""

    title: str
    text: str


@dataclass(frozen=True)
class Example:
    """Two continuations of one prompt; `same`: what both begin with. Rests are cut to what a page can bear."""

    prompt: str
    same: str
    ours: str
    theirs: str
    below: str


@dataclass(frozen=True)
class Examples:
    rows: tuple[Example, ...]


@dataclass(frozen=True)
class Tree:
    """Nested data: mappings and lists down to scalars."""

    data: Mapping[str, Any]


@dataclass(frozen=True)
class Fold:
    """A block that is shown when asked for."""

    title: str
    block: Table


Block = Prose | Code | Examples | Tree | Fold | Table | Picture


@dataclass(frozen=True)
class Section:
    """`id` is the anchor; `lead` says in a sentence what the section tells."""

    id: str
    title: str
    blocks: Sequence[Block]
    lead: str = ""


@dataclass(frozen=True)
class Figure:
    """One of the large numbers of the verdict: what it is, the number, and what stands below it."""

    label: str
    value: str
    below: str = ""
    tone: str = ""


def kind(block: Block) -> str:
    """The name by which a template tells blocks apart."""
    return type(block).__name__.lower()


def example(prompt: str, ours: str, theirs: str, below: str, most: int = 600) -> Example:
    """An Example, its texts cut after `most` characters."""
    same = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        same += 1
    rests = _cut(ours[same:], most), _cut(theirs[same:], most)
    return Example(_cut(prompt, most), _cut(ours[:same], most).lstrip(), *rests, below)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "…"
