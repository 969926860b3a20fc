"""All formats: from what a recipe asks for, and from what config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lilliput.errors import PlanError, SourceError
from lilliput.formats import affine, binary, codebook, integer, levels, nested, sign, ternary, trellis, vector
from lilliput.formats.format import Format
from lilliput.recipe import Target, nearest

# The name in a target's `format` to what makes the format of it.
_WANTED: Mapping[str, Callable[[Target], Format]] = {
    "int": nested.from_target,
    "affine": affine.from_target,
    **dict.fromkeys(levels.PRESETS, levels.from_target),
    "binary": binary.from_target,
    "sign": sign.from_target,
    "ternary": ternary.from_target,
    "e8": vector.e8_from_target,
    "vector": vector.from_target,
    "trellis": trellis.from_target,
    "trellis-half": trellis.half_from_target,
    "codebook": codebook.from_target,
}
# The kind in config.json to what reads it.
_WRITTEN: Mapping[str, Callable[[Mapping[str, Any]], Format]] = {
    "int": integer.from_plain,
    "nested": nested.from_plain,
    "affine": affine.from_plain,
    "levels": levels.from_plain,
    "binary": binary.from_plain,
    "sign": sign.from_plain,
    "ternary": ternary.from_plain,
    "e8": vector.e8_from_plain,
    "vector": vector.from_plain,
    "trellis": trellis.from_plain,
    "codebook": codebook.from_plain,
}


def from_target(target: Target) -> Format:
    """The format that a resolved target asks for.

    Raises PlanError for an unknown name (with the nearest), and where the format cannot have the target's settings.
    """
    if target.format not in _WANTED:
        raise PlanError(f"unknown format '{target.format}'.{nearest(target.format, _WANTED)}")
    return _WANTED[target.format](target)


def completed(target: Target) -> Target:
    """The target with what its format's name alone says: bits, group size and kind of scales.

    Raises PlanError where the target says otherwise.
    """
    return levels.completed(target) if target.format in levels.PRESETS else target


def from_plain(plain: Mapping[str, Any]) -> Format:
    """The format that config.json describes. Raises SourceError for a kind that this code does not know."""
    kind = plain["kind"]
    if kind not in _WRITTEN:
        raise SourceError(f"a part of kind {kind!r} is newer than this lilliput: install the one that wrote it")
    return _WRITTEN[kind](plain)


def names() -> tuple[str, ...]:
    """The names that a target's `format` may have."""
    return tuple(_WANTED)


def holds_zero(form: Format) -> bool:
    """Whether a weight can be exactly 0 on every grid of the format."""
    return not isinstance(form, (affine.AffineFormat, binary.BinaryFormat, sign.SignFormat))
