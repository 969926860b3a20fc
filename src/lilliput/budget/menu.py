"""Menus: the grids among which each linear gets one, by name or entry by entry.

An entry is FORMAT[BITS][/GROUP][/sym or /asym], such as int3/64/asym, affine4/32 or nf4/64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.errors import PlanError, nearest
from lilliput.target import Target

_GRID = re.compile(r"(int|affine)([2-8])")

# Symmetric integers are all that engines hold side by side; natively zero points pay for themselves.
MENUS: Mapping[str, tuple[str, ...]] = {
    "compressed-tensors": (
        *("int2/64", "int2/32", "int3/128", "int3/64", "int3/32", "int4/128", "int4/64", "int4/32"),
        *("int5/64", "int6/64", "int7/64", "int8/64"),
    ),
    "native": (
        *("int2/64/asym", "int2/32/asym", "int3/128/asym", "int3/64/asym", "int3/32/asym", "int4/128/asym"),
        *("int4/64/asym", "int4/32/asym", "int5/64/asym", "int6/64/asym", "int7/64/asym", "int8/64/asym"),
    ),
}
DEFAULT = "native"


def entries(menu: Sequence[str]) -> tuple[str, ...]:
    """The entries of a menu: a name of `MENUS`, or entries as they are. Raises PlanError for one that is neither."""
    if len(menu) == 1 and menu[0] in MENUS:
        return MENUS[menu[0]]
    if len(menu) == 1 and "/" not in menu[0] and not _GRID.fullmatch(menu[0]):
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
    found = _GRID.fullmatch(grid)
    named: dict[str, Any] = {"format": found[1], "bits": int(found[2])} if found else {"format": grid}
    named["symmetric"] = not (found and found[1] == "affine")
    for word in rest:
        if word.isdecimal() and int(word) > 0:
            named["group_size"] = int(word)
        elif word in ("channel", "tensor"):
            named["group_size"] = {"channel": -1, "tensor": 0}[word]
        elif word in ("sym", "asym"):
            named["symmetric"] = word == "sym"
        else:
            raise PlanError(f"menu entry '{entry}': '{word}' is no group and neither sym nor asym; write int4/64/asym")
    if not found and not re.fullmatch(r"[a-z]+[\w-]*", grid):
        raise _unknown(entry)
    return named


def _unknown(entry: str) -> PlanError:
    return PlanError(
        f"'{entry}' is neither a menu nor a grid: choose {' or '.join(MENUS)}, or write entries such as "
        f"int3/64/asym.{nearest(entry, MENUS)}"
    )


def on(target: Target, entry: str) -> Target:
    """The resolved target of a step with the grid of an entry in place of its own."""
    changed = fields(entry)
    return target.model_copy(update={"bits": None, **changed})
