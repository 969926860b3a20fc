"""A stored invertible transform that is the Kronecker product of two small matrices: x as [p, q] becomes L x RT."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lilliput.formats.format import Stored
from lilliput.parts.part import Get

LEFT, RIGHT = "_left", "_right"


@dataclass(frozen=True)
class FlatSpec:
    """Matrices of p and `width / p` entries a side, stored in float32."""

    p: int

    def describe(self) -> str:
        return f"kronecker product of {self.p}"

    def stored(self, width: int) -> Stored:
        q = width // self.p
        return {LEFT: (torch.float32, (self.p * self.p,)), RIGHT: (torch.float32, (q * q,))}

    def operations(self, width: int) -> int:
        return 2 * width * (self.p + width // self.p)

    def load(self, width: int, get: Get) -> Flat:
        q = width // self.p
        return Flat(get(LEFT).view(self.p, self.p), get(RIGHT).view(q, q))

    def plain(self) -> dict[str, Any]:
        return {"kind": "flat", "p": self.p}


@dataclass(frozen=True)
class Flat:
    """`left` [p, p] and `right` [q, q], float32 and invertible."""

    left: Tensor
    right: Tensor

    @property
    def spec(self) -> FlatSpec:
        return FlatSpec(len(self.left))

    @cached_property
    def _inverses(self) -> tuple[Tensor, Tensor]:
        left, right = (torch.linalg.inv(x.double()) for x in (self.left, self.right))
        return left, right

    def apply(self, x: Tensor) -> Tensor:
        return _multiplied(x, self.left, self.right)

    def undo(self, x: Tensor) -> Tensor:
        return _multiplied(x, *self._inverses)

    def adjoint(self, x: Tensor) -> Tensor:
        return _multiplied(x, self.left.T, self.right.T)

    def undo_adjoint(self, x: Tensor) -> Tensor:
        left, right = self._inverses
        return _multiplied(x, left.T, right.T)

    def pack(self) -> dict[str, Tensor]:
        return {LEFT: self.left.reshape(-1), RIGHT: self.right.reshape(-1)}


def _multiplied(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    grid = x.reshape(*x.shape[:-1], len(left), len(right))
    return (left.to(x) @ grid @ right.to(x).T).reshape(x.shape)
