"""What a method, a format or a driver takes: one type, so that a plan only adds up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """ram: bytes in memory at the fullest moment; disk: bytes in the work folder at the fullest moment; operations:
    multiply-adds."""

    ram: int = 0
    disk: int = 0
    operations: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Both at once."""
        return Cost(self.ram + other.ram, self.disk + other.disk, self.operations + other.operations)

    def then(self, other: Cost) -> Cost:
        """One after the other: the higher of the peaks, the sum of the operations."""
        return Cost(max(self.ram, other.ram), max(self.disk, other.disk), self.operations + other.operations)


@dataclass(frozen=True)
class Phase:
    """A part of a run by its name, and what it takes while it lasts."""

    name: str
    cost: Cost
