"""All formats: from what a recipe asks for, and from what config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lilliput.errors import PlanError, SourceError, nearest
from lilliput.formats import (
    affine,
    binary,
    codebook,
    either,
    ggml,
    integer,
    levels,
    nested,
    sign,
    ternary,
    trellis,
    vector,
)
from lilliput.formats.format import Family, Format
from lilliput.target import Target

# A new grid is one file and a line here.
FAMILIES: tuple[Family, ...] = (
    integer.FAMILY,
    nested.FAMILY,
    affine.FAMILY,
    levels.FAMILY,
    either.FAMILY,
    binary.FAMILY,
    sign.FAMILY,
    ternary.FAMILY,
    vector.FAMILY,
    trellis.FAMILY,
    codebook.FAMILY,
    ggml.FAMILY,
)
_WANTED: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.wanted}
_WRITTEN: Mapping[str, Callable[[Mapping[str, Any]], Format]] = {
    kind: reader for family in FAMILIES for kind, reader in family.written.items()
}


def from_target(target: Target) -> Format:
    """The format that a resolved target asks for.

    Raises PlanError for an unknown name (with the nearest), and where the format cannot have the target's settings.
    """
    if target.format not in _WANTED:
        raise PlanError(f"unknown format '{target.format}'.{nearest(target.format, _WANTED)}")
    return _WANTED[target.format].wanted[target.format](target)


def completed(target: Target) -> Target:
    """The target, as a user has written it, with what its format's name alone says: bits, group size, kind of scales.

    Raises PlanError where the target says otherwise.
    """
    family = _WANTED.get(target.format)
    if family is None:
        return target  # whoever makes the format says that there is none
    if not family.zero_points and not target.symmetric:
        raise PlanError(f"'{target.format}' has no zero points: leave out symmetric, or take format int or affine")
    return family.completed(target)


def fitting(target: Target, width: int) -> Target:
    """The target for rows of `width` inputs: its own, or what takes its place where its blocks do not divide them."""
    return ggml.fitting(target, width) if target.format in ggml.FAMILY.wanted else target


def from_plain(plain: Mapping[str, Any]) -> Format:
    """The format that config.json describes. Raises SourceError for a kind that this code does not know."""
    kind = plain["kind"]
    if kind not in _WRITTEN:
        raise SourceError(f"a part of kind {kind!r} is newer than this lilliput: install the version that wrote it")
    return _WRITTEN[kind](plain)


def names() -> tuple[str, ...]:
    """The names that a target's `format` may have."""
    return tuple(_WANTED)
