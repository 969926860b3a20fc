"""What the config of an engine's own layout tells of a linear: those with one setting are one group of it."""

from __future__ import annotations

from dataclasses import dataclass

from lilliput.export.outcome import Outcome
from lilliput.parts.inputs.grid import InputSpec


@dataclass(frozen=True)
class Setting:
    """layout: of compressed-tensors; group: -1 one scale per output row, as which a grid per tensor is written too;
    inputs: their grid, where they are rounded."""

    layout: str
    bits: int
    symmetric: bool
    group: int
    inputs: InputSpec | None = None


def setting_of(outcome: Outcome) -> Setting | None:
    """None where the linear stays dense."""
    form, layout = outcome.codes, outcome.layout
    if form is None or layout is None:
        return None
    group = -1 if form.group_size == 0 else form.group_size
    return Setting(layout, form.bits, form.symmetric, group, outcome.scheme.activation)
