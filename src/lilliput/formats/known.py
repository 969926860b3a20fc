"""All formats: from what a recipe asks for, and from what config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lilliput.errors import PlanError, SourceError, nearest
from lilliput.formats import affine, binary, codebook, integer, levels, nested, sign, ternary, trellis, vector
from lilliput.formats.format import Format
from lilliput.target import Target

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
# Formats whose bits nobody chooses.
_BITS: Mapping[str, str] = {"ternary": "1.6", "sign": "1"}
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
    """The target, as a user has written it, with what its format's name alone says: bits, group size, kind of scales.

    Raises PlanError where the target says otherwise.
    """
    name = target.format
    if name in levels.PRESETS:
        return levels.completed(target)
    if name not in ("int", "affine") and name in _WANTED and not target.symmetric:
        raise PlanError(f"'{name}' has no zero points: leave out symmetric, or take format int or affine")
    if name in _BITS and target.bits is not None:
        raise PlanError(f"'{name}' has {_BITS[name]} bits a weight by its nature: leave out bits")
    if name == "sign" and target.group_size != "auto":
        raise PlanError("'sign' has a value for each row and each column, not for groups: leave out group_size")
    return target.model_copy(update={"bits": 2}) if name == "e8" and target.bits is None else target


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
    """Whether a weight can be exactly 0 on every grid of the format; of codebooks on those that are told where."""
    without = affine.AffineFormat | binary.BinaryFormat | sign.SignFormat | vector.VectorFormat | trellis.TrellisFormat
    return not isinstance(form, without)
