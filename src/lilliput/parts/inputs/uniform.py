"""Inputs as integers with a common step: signed codes q, x = (q - zero) * scale.

With b bits a symmetric scale is max|x| / (2^b - 1) * 2, an asymmetric one (max - min) / (2^b - 1) with 0 inside the
range: the definitions of compressed-tensors, so that a folder in its layout computes the same in every reader. A
symmetric code may be the lowest one, -2^(b-1), and the largest input is half a step beyond the highest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats.format import Stored
from lilliput.parts.inputs import units
from lilliput.parts.inputs.units import Granularity
from lilliput.parts.part import Get

SCALE, ZERO = "_scale", "_zero"


@dataclass(frozen=True)
class UniformInput:
    """granularity: what shares a scale. Dynamic ones are found for each token, for groups of `group_size` inputs of a
    token, or for all that a forward pass brings ("tensor", which depends on what is batched together); static ones are
    stored, one for all inputs, for groups of channels, or for each channel. clip: share of the dynamic range that is
    covered. Raises PlanError for what cannot be."""

    bits: int
    granularity: Granularity = "token"
    group_size: int = 0
    symmetric: bool = True
    dynamic: bool = True
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise PlanError(f"inputs of {self.bits} bits: integers have 2 to 8; choose one of those")
        units.check(self.granularity, self.group_size, self.dynamic)

    def describe(self) -> str:
        unit = units.describe(self.granularity, self.group_size)
        kind = "" if self.symmetric else " asym"
        return f"int{self.bits} {unit}{kind}{'' if self.dynamic else ' static'}"

    @property
    def low(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1))

    @property
    def alike(self) -> bool:
        return self.granularity in ("token", "tensor")

    def stored(self, width: int) -> Stored:
        count = units.count(self.granularity, self.group_size, width)
        if self.dynamic:
            return {}
        scale: Stored = {SCALE: (torch.float32, (count,))}
        return scale if self.symmetric else scale | {ZERO: (torch.int32, (count,))}

    def steps(self, x: Tensor, get: Get) -> tuple[Tensor, Tensor, Tensor | None]:
        """x float32 [.., width] in steps of the grid, not rounded yet, with the scales and zero points (None: 0).

        Groups have a dimension of their own in all three.
        """
        seen = x.reshape(*x.shape[:-1], -1, self.group_size) if self.granularity == "group" else x
        if self.dynamic:
            low, high = units.extremes(seen, self.granularity)
            scale, zero = self.parameters(low * self.clip, high * self.clip)
        else:
            scale, zero = get(SCALE), None if self.symmetric else get(ZERO)
            if self.granularity == "group":
                scale, zero = scale[:, None], None if zero is None else zero[:, None]
        return seen / scale, scale, zero

    def codes(self, x: Tensor, get: Get) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes of x float32 [.., width], as floats, with scales and zero points (None: 0) that fit them."""
        steps, scale, zero = self.steps(x, get)
        codes = steps.round_()
        return (codes if zero is None else codes.add_(zero)).clamp_(self.low, -self.low - 1), scale, zero

    def round(self, x: Tensor, get: Get) -> Tensor:
        codes, scale, zero = self.codes(x, get)
        return (codes if zero is None else codes.sub_(zero)).mul_(scale).reshape(x.shape)

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale float32 and zero point for inputs between `low` and `high`; a scale of 0 becomes 1."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        steps = (1 << self.bits) - 1
        if self.symmetric:
            return _usable(torch.maximum(-low, high) / (steps / 2)), None
        scale = _usable((high - low) / steps)
        return scale, (self.low - low / scale).round().clamp(self.low, -self.low - 1)

    def plain(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"kind": "uniform", "bits": self.bits, "granularity": self.granularity}
        entry |= {"symmetric": self.symmetric, "dynamic": self.dynamic}
        if self.group_size:
            entry["group_size"] = self.group_size
        if self.clip != 1.0:
            entry["clip"] = self.clip
        return entry


def _usable(scale: Tensor) -> Tensor:
    return scale.masked_fill(scale == 0, 1.0)  # NaN stays, and shows


def from_plain(plain: Mapping[str, Any]) -> UniformInput:
    """Undo `UniformInput.plain`."""
    return UniformInput(
        int(plain["bits"]),
        plain["granularity"],
        int(plain.get("group_size", 0)),
        bool(plain["symmetric"]),
        bool(plain["dynamic"]),
        float(plain.get("clip", 1.0)),
    )
