"""Menus: the grids among which each linear gets one, by name or entry by entry.

An entry is FORMAT[BITS][/GROUP][/sym or /asym][/SCALES][/N:M], such as int3/64/asym, affine4/32, trellis-half2, nf4/64,
int3/32/asym/int6, whose scales are integers of 6 bits, or int4/64/asym/2:4, which keeps two of every four weights.
Several names of menus stand for all of their entries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.errors import PlanError, nearest
from lilliput.target import Target

_GRID = re.compile(r"(int|affine|trellis|trellis-half)([2-8])")
_TURNED = ("trellis", "trellis-half")  # formats whose codes lie between rotations, and have one scale a matrix

# Symmetric integers are all that engines hold side by side; natively zero points pay for themselves.
MENUS: Mapping[str, tuple[str, ...]] = {
    "compressed-tensors": (
        *("int2/64", "int2/32", "int3/128", "int3/64", "int3/32", "int4/128", "int4/64", "int4/32"),
        *("int5/64", "int6/64", "int7/64", "int8/64"),
    ),
    "integers": (
        *("int2/64/asym", "int2/32/asym", "int3/128/asym", "int3/64/asym", "int3/32/asym", "int4/128/asym"),
        *("int4/64/asym", "int4/32/asym", "int5/64/asym", "int6/64/asym", "int7/64/asym", "int8/64/asym"),
    ),
    "native": (
        *("trellis2", "trellis-half2", "trellis3", "trellis-half3", "trellis4", "trellis-half4"),
        *("int2/32/asym/int4", "int3/32/asym/int6", "int3/64/asym", "int4/32/asym/int6", "int4/64/asym", "nf4/64"),
        *("affine4/64", "int5/64/asym", "int6/64/asym", "int7/64/asym", "int8/64/asym", "int8/channel"),
    ),
    "prune": (
        *("int3/64/asym/2:4", "int4/64/asym/2:4", "int5/64/asym/2:4", "int6/64/asym/2:4", "int8/64/asym/2:4"),
        *("int3/64/asym/4:8", "int4/64/asym/4:8", "int4/64/asym/6:8", "int5/64/asym/6:8", "int6/64/asym/6:8"),
    ),
    "gguf": (
        *("tq2_0", "q2_k", "q3_k", "iq4_xs", "iq4_nl", "q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k"),
        "q8_0",
    ),
}
DEFAULT = "native"
_ALSO = {"quantize": DEFAULT}  # other names of menus


def entries(menu: Sequence[str]) -> tuple[str, ...]:
    """The entries of a menu: a name of `MENUS`, or entries as they are. Raises PlanError for one that is neither."""
    if menu and all(name in MENUS or name in _ALSO for name in menu):
        named = dict.fromkeys(_ALSO.get(name, name) for name in menu)
        return tuple(dict.fromkeys(entry for name in named for entry in MENUS[name]))
    if len(menu) == 1 and "/" not in menu[0] and not _GRID.fullmatch(menu[0]) and menu[0] not in MENUS["gguf"]:
        raise _unknown(menu[0])
    for entry in menu:
        fields(entry)
    if not menu:
        raise PlanError(f"a menu has at least one grid: give --menu {' or '.join(MENUS)}, or entries such as int4/64")
    if len(set(menu)) < len(menu):
        raise PlanError(f"the menu {', '.join(menu)} has an entry twice: name each grid once")
    return tuple(menu)


def fields(entry: str) -> dict[str, Any]:
    """The fields of a target that an entry names. Raises PlanError that says how an entry is written."""
    grid, *rest = entry.split("/")
    integers = _GRID.fullmatch(grid)
    if not integers and not re.fullmatch(r"[a-z]+[\w-]*", grid):
        raise _unknown(entry)
    named: dict[str, Any] = {"format": grid}
    if integers:
        named = {"format": integers[1], "bits": int(integers[2])}
    named["symmetric"] = named["format"] != "affine"
    if named["format"] in _TURNED:
        named["group_size"] = 0
    for word in rest:
        if word.isdecimal() and int(word) > 0:
            named["group_size"] = int(word)
        elif word in ("channel", "tensor"):
            named["group_size"] = {"channel": -1, "tensor": 0}[word]
        elif word in ("sym", "asym"):
            named["symmetric"] = word == "sym"
        elif re.fullmatch(r"int[2-8]", word):
            named["scale_dtype"] = f"{word}/row"
        elif re.fullmatch(r"[1-9]\d*:[1-9]\d*", word):
            named["pattern"] = word
        else:
            raise PlanError(
                f"menu entry '{entry}': '{word}' is no group, neither sym nor asym, no kind of scales and no pattern; "
                "write int4/64/asym, int4/32/asym/int6 for scales of 6 bits, or int4/64/asym/2:4"
            )
    return named


def check(menu_entries: Sequence[str], container: str | None) -> None:
    """Raises PlanError for an entry that the container cannot hold; None: a folder, which holds every grid."""
    if container != "gguf":
        return
    for entry in menu_entries:
        grid = fields(entry)
        group = grid.get("group_size", 0)
        whole = grid["format"] == "int" and grid["symmetric"] and (group <= 0 or group % 32 == 0)
        whole = whole and "pattern" not in grid
        if entry not in MENUS["gguf"] and not whole:
            raise PlanError(
                f"no engine holds the menu: a GGUF file has no type for '{entry}'; take --menu gguf, or entries such "
                f"as {', '.join(MENUS['gguf'][2:5])}"
            )


def pruned(target: Target) -> bool:
    """Whether only some of every few weights stay."""
    return target.pattern is not None


def turned(target: Target) -> bool:
    """Whether the codes of a target lie between rotations."""
    return target.format in _TURNED


def _unknown(entry: str) -> PlanError:
    return PlanError(
        f"'{entry}' is neither a menu nor a grid: choose {' or '.join(MENUS)}, or write entries such as "
        f"int3/64/asym.{nearest(entry, MENUS)}"
    )


def on(target: Target, entry: str) -> Target:
    """The resolved target of a step with the grid of an entry in place of its own."""
    changed = fields(entry)
    return target.model_copy(update={"bits": None, **changed})
