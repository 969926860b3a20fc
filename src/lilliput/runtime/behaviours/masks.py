"""Static masks of a folder whose MLPs have gates: for a task, the same groups of hidden channels for every token.

A mask is a file `masks/NAME.json` beside the weights, which it does not change: by MLP, the groups that are used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lilliput.errors import LilliputError, SourceError
from lilliput.runtime import behaviours
from lilliput.runtime.behaviours.gates import gated

FOLDER = "masks"
VERSION = 1


def path_of(folder: Path, name: str) -> Path:
    """Where a mask lies. Raises LilliputError for a name that is none."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise LilliputError(f"'{name}' is no name for a mask: use letters, digits, '_', '-' and '.'")
    return folder / FOLDER / f"{name}.json"


def names(folder: Path) -> tuple[str, ...]:
    """The masks of a folder."""
    return tuple(sorted(x.stem for x in (folder / FOLDER).glob("*.json")))


def write(folder: Path, name: str, groups: Mapping[str, Sequence[int]], facts: Mapping[str, Any]) -> Path:
    """Write a mask: by MLP, the groups that are used; facts: what a reader may want to know of it."""
    path = path_of(folder, name)
    path.parent.mkdir(exist_ok=True)
    plain = {"version": VERSION, **facts, "groups": {mlp: list(used) for mlp, used in groups.items()}}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def use(model: nn.Module, name: str | None, folder: str | Path | None = None) -> None:
    """Run a loaded model with the mask `name` of its folder, or of another one; None: with its predictors again.

    Weights stay as they are. Raises LilliputError for a model without gates, SourceError for a mask that is missing or
    of another model.
    """
    state = behaviours.require(model)
    mlps = gated(model)
    if not mlps:
        raise LilliputError("this model's MLPs have no gates: masks are for folders that dynamic-pruning has written")
    if name is None:
        state.mask = None
        return
    place = Path(str(getattr(model, "name_or_path", "")) if folder is None else folder)
    path = path_of(place, name)
    if not path.is_file():
        known = ", ".join(names(place)) or "none"
        raise SourceError(f"{place} has no mask '{name}' (it has: {known}): record it with lilliput.record_mask")
    groups = _read(path)
    if groups.keys() != {x.gates.name for x in mlps}:
        raise SourceError(f"{path} is a mask of other MLPs than this model has: record it anew")
    chosen = {}
    for mlp in mlps:
        used = groups[mlp.gates.name]
        if not used or min(used) < 0 or max(used) >= mlp.gates.groups:
            raise SourceError(f"{path} names groups that '{mlp.gates.name}' does not have: record it anew")
        mask = torch.zeros(mlp.gates.groups, dtype=torch.bool)
        mask[used] = True
        chosen[mlp] = mask
    for mlp, mask in chosen.items():
        mlp.gates.masks[name] = mask
    state.mask = name


def _read(path: Path) -> dict[str, list[int]]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain["version"] != VERSION:
            raise SourceError(f"{path} has version {plain['version']!r}, and this lilliput reads {VERSION}")
        return {str(mlp): [int(x) for x in used] for mlp, used in plain["groups"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} is damaged: {error!r}; record it anew") from None
