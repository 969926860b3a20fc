"""Inputs of 4 bits in pairs of neighbours, of which one may be an outlier at the cost of the other.

With a static scale s the codes of ordinary inputs are the integers -7 .. 7; the code of -8 is reserved: it says that
its place in the pair is empty, 0, and that the other code is an outlier's. Those are small floats e2m1 with bias 2,
(2 + f) 2^(E + 2) in units of s, f in 0, 1 and E in 0 .. 3, without the smallest: 12, 16, 24, 32, 48, 64, 96, of either
sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats.format import Stored
from lilliput.parts.inputs.uniform import SCALE
from lilliput.parts.part import Get

TOP = 7.0  # of an ordinary input, in units of the scale; what is larger is an outlier
FAR = (12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0)


@dataclass(frozen=True)
class PairInput:
    """Always of 4 bits."""

    @property
    def bits(self) -> float:
        return 4

    def describe(self) -> str:
        return "int4 in pairs with outliers static"

    @property
    def alike(self) -> bool:
        return False

    def stored(self, width: int) -> Stored:
        if width % 2:
            raise PlanError(f"{width} inputs do not come in pairs: exclude this layer, or take act-static-dynamic")
        return {SCALE: (torch.float32, (1,))}

    def round(self, x: Tensor, get: Get) -> Tensor:
        scale = get(SCALE)
        unit = (x / scale).view(*x.shape[:-1], -1, 2)
        size = unit.abs()
        larger = size[..., :1] >= size[..., 1:]
        alone = size.amax(-1, keepdim=True) > TOP  # the pair holds an outlier, and only the larger of the two stays
        stays = torch.cat([larger, ~larger], -1)
        values = torch.where(alone, torch.where(stays, far(unit), 0.0), unit.round().clamp_(-TOP, TOP))
        return torch.where(unit.isnan(), unit, values).flatten(-2).mul_(scale)

    def plain(self) -> dict[str, Any]:
        return {"kind": "pairs"}


def far(x: Tensor) -> Tensor:
    """The nearest of an outlier's values, in units of the scale; ties go to the smaller."""
    levels = torch.tensor(FAR, device=x.device, dtype=x.dtype)
    edges = (levels[1:] + levels[:-1]) / 2
    return levels[torch.bucketize(x.abs(), edges)] * x.sign()


def from_plain(plain: Mapping[str, Any]) -> PairInput:
    """Undo `PairInput.plain`."""
    return PairInput()
