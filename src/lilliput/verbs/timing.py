"""What an edit asks for that chooses sizes by time: a table of what blocks take at other widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MEASURE = "measure"

BlockTimes = Mapping[str, Mapping[int, int]]
"""Of one block, under the keys of `EditScores`, nanoseconds of the linears that have such units by how many of them
stay, the present number among them; under "rest" those of its other linears, for 0 units."""

Times = Sequence[BlockTimes]
"""Of all blocks, in order."""


@dataclass(frozen=True)
class Timing:
    """device: a device whose roofline gives the times, by name, or MEASURE: they are measured on what the run computes
    on. tokens: of a pass. multiple: of hidden channels. points: widths of an MLP that are timed, at most."""

    device: str
    tokens: int
    multiple: int
    points: int
