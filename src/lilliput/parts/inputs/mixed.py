"""Inputs as integers by token, but for channels that hold an outlier, which stay as they are.

Which channels those are is found in each forward pass: all with some |x_tj| >= threshold among the tokens that the pass
brings. The scale of a token is that of its inputs in the other channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats.format import Stored
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.parts.part import Get


@dataclass(frozen=True)
class MixedInput:
    """threshold: the least size of an outlier; 0: nothing is rounded. Raises PlanError for what cannot be."""

    bits: int
    threshold: float

    def __post_init__(self) -> None:
        UniformInput(self.bits)  # which says what bits integers have
        if not self.threshold >= 0:
            raise PlanError(f"an outlier of {self.threshold} or more: a threshold is 0 or positive")

    def describe(self) -> str:
        return f"int{self.bits} token below {self.threshold:g}"

    @property
    def alike(self) -> bool:
        return False

    def stored(self, width: int) -> Stored:
        return {}

    def round(self, x: Tensor, get: Get) -> Tensor:
        kept = (x.abs() >= self.threshold).flatten(0, -2).any(0) if x.dim() > 1 else x.abs() >= self.threshold
        rounded = UniformInput(self.bits).round(torch.where(kept, 0.0, x), get)
        return torch.where(kept, x, rounded)

    def plain(self) -> dict[str, Any]:
        return {"kind": "mixed", "bits": self.bits, "threshold": self.threshold}


def from_plain(plain: Mapping[str, Any]) -> MixedInput:
    """Undo `MixedInput.plain`."""
    return MixedInput(int(plain["bits"]), float(plain["threshold"]))
