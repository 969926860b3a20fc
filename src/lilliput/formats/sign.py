"""Signs with two value vectors: value_ij = left_i right_j sign_ij, one bit a weight and 16 for every row and column.

Xu et al. 2024, OneBit, arXiv 2402.11295 (sign-value-independent decomposition).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.formats import integer
from lilliput.formats.bits import row_bytes, unpack_bits
from lilliput.formats.format import Family, Format, Stored, dtype_name, dtype_of, fixed_bits
from lilliput.target import Target


@dataclass(frozen=True)
class SignGrid:
    """`left` [out] and `right` [in], in the format's scale dtype, not negative."""

    left: Tensor
    right: Tensor

    def rows(self, start: int, stop: int) -> SignGrid:
        """The grid of output rows [start, stop)."""
        return SignGrid(self.left[start:stop], self.right)


@dataclass(frozen=True)
class SignFormat(Format):
    """One sign a weight, and a value for each output and each input."""

    holds_zero: ClassVar[bool] = False

    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.scale_dtype not in integer.SCALE_DTYPES:
            raise PlanError(f"values in {self.scale_dtype}: choose float16, bfloat16 or float32")

    def describe(self) -> str:
        """For tables: "sign"."""
        return "sign"

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size: signs and two vectors."""
        return rows * width + (rows + width) * self.scale_dtype.itemsize * 8

    def fit(self, weight: Tensor, *, importance: Tensor | None = None, rounds: int = 30) -> SignGrid:
        """left, right of least sum of h (|w_ij| - left_i right_j)^2, h the `importance` ([in] or [out, in]; None: 1).

        Alternating least squares from the rows' means: the power iteration for the first singular pair of |W| where
        h is 1 or of rank one. Both are scaled to like size, and left is fitted once more on right as it is stored.
        Raises LilliputError for NaN or infinity, and for values above the scale dtype.
        """
        size = weight.abs().double()
        h = torch.ones_like(size[:1]) if importance is None else importance.double().reshape(-1, weight.shape[1])
        if not bool(torch.isfinite(size.sum())) or not bool(torch.isfinite(h.sum())):
            raise LilliputError("the weight or its importance contains NaN or infinity: it cannot be quantized")
        h = (h if bool((h > 0).any()) else torch.ones_like(h)).expand_as(size)
        weighted = size * h

        def ratio(top: Tensor, bottom: Tensor) -> Tensor:
            return torch.where(bottom > 0, top / bottom.clamp(min=1e-300), 0.0)

        right = ratio(weighted.sum(0), h.sum(0))
        left = torch.zeros_like(size[:, 0])
        for _ in range(max(1, rounds)):
            left = ratio(weighted @ right, h @ right.square())
            right = ratio(weighted.T @ left, h.T @ left.square())
            right = right / right.norm().clamp(min=1e-300)
        left = ratio(weighted @ right, h @ right.square())
        even = ratio(left.norm(), right.norm()).sqrt()
        stored = (right * even).to(self.scale_dtype)
        left = ratio(weighted @ stored.double(), h @ stored.double().square())
        grid = SignGrid(left.to(self.scale_dtype), stored)
        if not bool(torch.isfinite(grid.left).all() and torch.isfinite(grid.right).all()):
            name = dtype_name(self.scale_dtype)
            raise LilliputError(f"a value exceeds the range of {name}: set scale_dtype to float32 for this layer")
        return grid

    def encode(self, weight: Tensor, grid: SignGrid) -> Tensor:
        """The signs, int8 [out, in]: 0 for w >= 0, -1 for w < 0."""
        return -(weight < 0).to(torch.int8)

    def decode(self, codes: Tensor, grid: SignGrid) -> Tensor:
        """The values of codes [out, in], float32."""
        return (2.0 * codes + 1.0) * grid.left.float().unsqueeze(1) * grid.right.float()

    def stored(self, rows: int, width: int) -> Stored:
        """See docs/native-format.md, kind "sign"."""
        return {
            "": (torch.uint8, (rows * row_bytes(width, 1),)),
            "_left": (self.scale_dtype, (rows,)),
            "_right": (self.scale_dtype, (width,)),
        }

    def pack(self, codes: Tensor, grid: SignGrid) -> dict[str, Tensor]:
        """The tensors that `stored` describes."""
        return {"": integer.pack_codes(codes, 1), "_left": grid.left.contiguous(), "_right": grid.right.contiguous()}

    def unpack(
        self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int
    ) -> tuple[Tensor, SignGrid]:
        """Codes and grid of rows [start, stop) of a [rows, width] matrix; `get` returns a stored tensor by suffix."""
        packed = get("").view(rows, -1)[start:stop]
        return unpack_bits(packed, 1, width), SignGrid(get("_left"), get("_right")).rows(start, stop)

    def plain(self) -> dict[str, Any]:
        """The entry of config.json."""
        return {"kind": "sign", "scale_dtype": dtype_name(self.scale_dtype)}


def from_plain(plain: Mapping[str, Any]) -> SignFormat:
    """Undo `SignFormat.plain`."""
    return SignFormat(dtype_of(plain["scale_dtype"]))


def from_target(target: Target) -> SignFormat:
    """Signs with values in the type that a target names for scales; its bits and groups are not read."""
    return SignFormat(integer.scale_dtype_of(target))


def completed(target: Target) -> Target:
    """See `Family`."""
    fixed_bits(target, "1")
    if target.group_size != "auto":
        raise PlanError("'sign' has a value for each row and each column, not for groups: leave out group_size")
    return target


FAMILY = Family(wanted={"sign": from_target}, written={"sign": from_plain}, completed=completed)
