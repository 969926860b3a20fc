"""What passes between the two halves of an allocation: scores by block, and the budget that they divide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lilliput.recipe import Target

Scores = Mapping[str, tuple[float, ...]]
"""By linear name, a few numbers whose meaning is the method's own (its loss at each option, say). They go through the
journal, so they are plain floats. `score` names linears as its block does, `allocate` sees their full names."""


@dataclass(frozen=True)
class Share:
    """One linear that takes part in a division: its block, its number of weights, what the recipe wants of it, and the
    bytes that the file holds of it with another target (None: the division does not change sizes)."""

    block: int
    weights: int
    target: Target
    size: Callable[[Target], int] | None = None


Budget = Mapping[str, Share]
"""By full linear name, in the order of execution: the recipe's targets are the average that must be kept."""
