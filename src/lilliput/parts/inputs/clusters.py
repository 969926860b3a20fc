"""Inputs as integers with a static range for each cluster of channels.

Stored: the cluster of each channel, uint8 [width], and scale and zero point of each cluster. Where the clusters lie
does not matter to the values; a kernel wants the channels of one beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats.format import Stored
from lilliput.parts.inputs.uniform import SCALE, ZERO, UniformInput
from lilliput.parts.part import Get

CLUSTER = "_cluster"
MOST = 256


@dataclass(frozen=True)
class ClusterInput:
    """count: clusters. Raises PlanError for what cannot be."""

    bits: int
    count: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        UniformInput(self.bits)  # which says what bits integers have
        if not 1 <= self.count <= MOST:
            raise PlanError(f"{self.count} clusters of channels: a byte says which of 1 to {MOST}")

    @property
    def channels(self) -> UniformInput:
        """The same with a scale for each channel."""
        return UniformInput(self.bits, "channel", symmetric=self.symmetric, dynamic=False)

    def describe(self) -> str:
        return f"int{self.bits} in {self.count} clusters{'' if self.symmetric else ' asym'} static"

    @property
    def alike(self) -> bool:
        return False

    def stored(self, width: int) -> Stored:
        if self.count > width:
            raise PlanError(f"{self.count} clusters of {width} channels: give as many at most")
        own: Stored = {CLUSTER: (torch.uint8, (width,)), SCALE: (torch.float32, (self.count,))}
        return own if self.symmetric else own | {ZERO: (torch.int32, (self.count,))}

    def round(self, x: Tensor, get: Get) -> Tensor:
        place = get(CLUSTER).long()
        return self.channels.round(x, lambda suffix: get(suffix)[place])

    def plain(self) -> dict[str, Any]:
        return {"kind": "clusters", "bits": self.bits, "count": self.count, "symmetric": self.symmetric}


def from_plain(plain: Mapping[str, Any]) -> ClusterInput:
    """Undo `ClusterInput.plain`."""
    return ClusterInput(int(plain["bits"]), int(plain["count"]), bool(plain["symmetric"]))
