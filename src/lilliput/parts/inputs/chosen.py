"""Inputs on the grid that text has chosen for them: integers, or floats with one of several splits of their bits.

Stored: which grid (`_form`: 0 integers, 1 + m floats with m mantissa bits), the largest value c that it reaches, and,
where channels have offsets, k_j of each channel: its values are those of the grid times 2^-k_j. A float of b bits has
e = b - 1 - m exponent bits and no patterns for infinity or NaN; its values are scaled so that the largest is c, which
is a real-valued exponent bias.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats import tables
from lilliput.formats.format import Stored
from lilliput.formats.tables import Float, Table
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.parts.part import Get

FORM, TOP, OFFSET = "_form", "_top", "_offset"
INTEGER = 0
_EXPONENTS = 5  # more exponent bits than that reach further than float32 does


def splits(bits: int) -> tuple[int, ...]:
    """The floats of so many bits, as `_form` names them."""
    return tuple(1 + m for m in range(bits - 1) if 1 <= bits - 1 - m <= _EXPONENTS)


def exponents(bits: int, form: int) -> int:
    """Exponent bits of a float; 0 for integers."""
    return 0 if form == INTEGER else bits - form


def describe(bits: int, form: int) -> str:
    """ "int8", "e4m3"."""
    return f"int{bits}" if form == INTEGER else f"e{exponents(bits, form)}m{form - 1}"


@dataclass(frozen=True)
class ChosenInput:
    """offsets: whether each channel has a power of two of its own. Raises PlanError for what cannot be."""

    bits: int
    offsets: bool = False

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 8:
            raise PlanError(f"inputs of {self.bits} bits: integers and floats to choose from have 3 to 8")

    def describe(self) -> str:
        return f"int or float {self.bits} static{' with offsets' if self.offsets else ''}"

    @property
    def alike(self) -> bool:
        return not self.offsets

    def stored(self, width: int) -> Stored:
        own: Stored = {FORM: (torch.uint8, (1,)), TOP: (torch.float32, (1,))}
        return own | {OFFSET: (torch.uint8, (width,))} if self.offsets else own

    def round(self, x: Tensor, get: Get) -> Tensor:
        form, top = int(get(FORM)), get(TOP)
        if not self.offsets:
            return on(x, self.bits, form, top)
        factor = torch.exp2(get(OFFSET).float())
        return on(x * factor, self.bits, form, top).div_(factor)

    def plain(self) -> dict[str, Any]:
        return {"kind": "chosen", "bits": self.bits, "offsets": self.offsets}


def on(x: Tensor, bits: int, form: int, top: Tensor) -> Tensor:
    """x float32 on a grid that reaches `top`, a tensor that broadcasts to x."""
    if form == INTEGER:
        spec = UniformInput(bits)
        scale = top / (((1 << bits) - 1) / 2)
        return (x / scale).round_().clamp_(spec.low, -spec.low - 1).mul_(scale)
    table = table_of(bits, form)
    scale = top / table.top
    values = x / scale
    table.snap(values)
    return values.mul_(scale)


@functools.cache
def table_of(bits: int, form: int) -> Table:
    """The values of a float before they are scaled: the smallest normal one is 1."""
    m = form - 1
    kind = Float(bits, m, 0, 2.0 ** (2 ** exponents(bits, form) - 2) * (2 - 2.0**-m))
    levels = torch.tensor(tables.floats(kind), dtype=torch.float32)
    return Table(levels, levels, kind, None)


def from_plain(plain: Mapping[str, Any]) -> ChosenInput:
    """Undo `ChosenInput.plain`."""
    return ChosenInput(int(plain["bits"]), bool(plain["offsets"]))
