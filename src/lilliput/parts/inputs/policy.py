"""Inputs as integers with a scale that is stored, or with one for each token, as text has decided for each linear.

Stored: `_mode`, 0 static and 1 by token, and the static scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.formats.format import Stored
from lilliput.parts.inputs.uniform import SCALE, UniformInput
from lilliput.parts.part import Get

MODE = "_mode"


@dataclass(frozen=True)
class PolicyInput:
    """Symmetric. Raises PlanError for bits that integers do not have."""

    bits: int

    def __post_init__(self) -> None:
        UniformInput(self.bits)

    def describe(self) -> str:
        return f"int{self.bits} static or token"

    @property
    def alike(self) -> bool:
        return True

    def stored(self, width: int) -> Stored:
        return {MODE: (torch.uint8, (1,)), SCALE: (torch.float32, (1,))}

    def round(self, x: Tensor, get: Get) -> Tensor:
        spec = UniformInput(self.bits) if bool(get(MODE)) else UniformInput(self.bits, "tensor", dynamic=False)
        return spec.round(x, get)

    def plain(self) -> dict[str, Any]:
        return {"kind": "policy", "bits": self.bits}


def from_plain(plain: Mapping[str, Any]) -> PolicyInput:
    """Undo `PolicyInput.plain`."""
    return PolicyInput(int(plain["bits"]))
