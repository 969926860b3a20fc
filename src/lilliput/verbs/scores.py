"""What passes between the two halves of an allocation: scores by block, and the budget that they divide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lilliput.target import Target

Scores = Mapping[str, tuple[float, ...]]
"""By linear name, a few numbers whose meaning is the method's own (its loss at each option, say). They go through the
journal, so they are plain floats. `score` names linears as its block does, `allocate` sees their full names."""


@dataclass(frozen=True)
class Share:
    """One linear that takes part in a division: its block, its shape (outputs, inputs), what the recipe wants of it,
    and the bytes that the file holds of it with another target (None: the division does not change sizes)."""

    block: int
    shape: tuple[int, int]
    target: Target
    size: Callable[[Target], int] | None = None

    @property
    def weights(self) -> int:
        """Their number."""
        return self.shape[0] * self.shape[1]


Budget = Mapping[str, Share]
"""By full linear name, in the order of execution: the recipe's targets are the average that must be kept."""

Loss = Callable[[Mapping[str, Target], int], float]
"""Mean cross-entropy in nats of the whole model on calibration text when some linears, by full name, are compressed to
the targets given and all others are as they were; the second number is how many calls may follow at most."""
