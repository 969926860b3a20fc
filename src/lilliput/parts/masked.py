"""Kept weights of a matrix as their values and a mask: what the parts that store them in different ways share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lilliput.parts.part import PartSpec


@dataclass(frozen=True)
class MaskedPart(ABC):
    """`values` [count] of the places where `mask` [out, in] is true, in the order of the rows."""

    values: Tensor
    mask: Tensor
    dtype: torch.dtype = torch.float16

    @property
    @abstractmethod
    def spec(self) -> PartSpec:
        """How they are stored."""

    @abstractmethod
    def pack(self) -> dict[str, Tensor]:
        """The tensors that `spec.stored` describes."""

    @classmethod
    def gather(cls, weight: Tensor, mask: Tensor, dtype: torch.dtype = torch.float16) -> Self:
        """The weights [out, in] at the places of a boolean `mask` [out, in]."""
        return cls(weight[mask], mask, dtype)

    def decode(self) -> Tensor:
        out = torch.zeros(self.mask.shape, device=self.values.device)
        return out.masked_scatter_(self.mask, self.values.to(self.dtype).float())

    def bits(self) -> int:
        return self.spec.size_bits(*self.mask.shape)

    def rows(self, start: int, stop: int) -> Self:
        begin = int(self.mask[:start].sum())
        mask = self.mask[start:stop]
        return replace(self, values=self.values[begin : begin + int(mask.sum())], mask=mask)
