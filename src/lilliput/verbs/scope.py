"""What follows from the scope of a step that prunes: which weights are compared with each other."""

from __future__ import annotations

from typing import Protocol

from lilliput.algebra import masks
from lilliput.target import Target


class Scoped(Protocol):
    """Options with a scope: "row", or what spans several rows, "layer" or "block"."""

    @property
    def scope(self) -> str: ...


def kept(target: Target, o: Scoped, rows: int, width: int) -> int:
    """How many weights of a [rows, width] matrix stay. Raises PlanError when the target asks for no sparsity."""
    return masks.kept(target.sparsity, target.pattern, "row" if o.scope == "row" else "layer", rows, width)


def mixes(target: Target, o: Scoped) -> bool:
    """Whether weights of several rows compete."""
    return target.pattern is None and o.scope != "row"
