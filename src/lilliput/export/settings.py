"""What the config of an engine's own layout tells of a linear: those with one setting are one group of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lilliput.export.layouts import BLOCKS
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


def decoded_at_load(outcomes: Iterable[Outcome]) -> Outcome | None:
    """The first linear because of which a folder asks transformers to decode while it loads; None: nothing does.

    transformers 5.23.0 gives an unpacked shape to zero points otherwise, and what it decodes later from small floats in
    blocks is bfloat16, which models of another dtype do not multiply with.
    """
    for x in outcomes:
        if x.codes is not None and (not x.codes.symmetric or (x.layout in BLOCKS and x.dtype != torch.bfloat16)):
            return x
    return None
