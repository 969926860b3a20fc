"""What folds do to single tensors: changes along one axis of a weight [out, in], or of a vector [out]."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lilliput.algebra.rotations import turned
from lilliput.errors import LilliputError


@dataclass(frozen=True)
class Scaled:
    """Entries along an axis times `factor`, float32."""

    axis: int
    factor: Tensor

    def apply(self, value: Tensor) -> Tensor:
        return value * (self.factor[:, None] if self.axis == 0 and value.dim() == 2 else self.factor)

    def squares(self, squares: Tensor) -> Tensor:
        factor = self.factor.to(squares.device).square()
        return squares / (factor[:, None] if self.axis == 0 else factor)


@dataclass(frozen=True)
class Ordered:
    """Entry j along an axis is what entry `order[j]` was."""

    axis: int
    order: Tensor

    def apply(self, value: Tensor) -> Tensor:
        return value.index_select(self.axis, self.order)

    def squares(self, squares: Tensor) -> Tensor:
        return squares.index_select(self.axis, self.order.to(squares.device))


@dataclass(frozen=True)
class Turned:
    """Stretches of entries along an axis, `places` int64 [n, h], become themselves times `matrices` float64 [n, h, h],
    as rows of vectors."""

    axis: int
    places: Tensor
    matrices: Tensor

    def apply(self, value: Tensor) -> Tensor:
        return turned(value, self.places, self.matrices, self.axis)

    def squares(self, squares: Tensor) -> Tensor:
        raise LilliputError(
            "squared gradients by single weights do not survive a rotation of heads: leave head-rotation out, or take "
            "a method that reads none"
        )


@dataclass(frozen=True)
class Added:
    """A vector plus another, float32; no weight has one."""

    vector: Tensor

    def apply(self, value: Tensor) -> Tensor:
        return value + self.vector

    def squares(self, squares: Tensor) -> Tensor:
        return squares


Change = Scaled | Ordered | Turned | Added
