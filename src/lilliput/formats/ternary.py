"""Ternary grids: -s, 0 or s, with a scale for every row or group; five codes in a byte (3^5 = 243), 1.6 bits a weight.

Li et al. 2016, ternary weight networks, arXiv 1605.04711.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lilliput.algebra.ranges import relative
from lilliput.algebra.ranges import stored as as_stored
from lilliput.errors import LilliputError, PlanError
from lilliput.formats import groups, integer
from lilliput.formats.format import Family, Format, Stored, dtype_name, dtype_of, fixed_bits
from lilliput.target import Target

_CHUNK = 1 << 17  # weights fitted at a time
PER_BYTE = 5


@dataclass(frozen=True)
class TernaryGrid:
    """`scale` [out, groups] in the format's scale dtype, positive."""

    scale: Tensor

    def rows(self, start: int, stop: int) -> TernaryGrid:
        """The grid of output rows [start, stop)."""
        return TernaryGrid(self.scale[start:stop])


@dataclass(frozen=True)
class TernaryFormat(Format):
    """`group_size`: -1 one scale per output row, else inputs per group. Raises PlanError for 0 or below -1."""

    group_size: int
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.group_size < -1 or self.group_size == 0:
            raise PlanError("a ternary grid has a scale per group or per row: give a positive group size or 'channel'")
        if self.scale_dtype not in integer.SCALE_DTYPES:
            raise PlanError(f"scales in {self.scale_dtype}: choose float16, bfloat16 or float32")

    def describe(self) -> str:
        """For tables: "ternary g64"."""
        return f"ternary {'row' if self.group_size < 0 else f'g{self.group_size}'}"

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size: every row's codes in whole bytes of five, and the scales."""
        scales = rows * groups.count(width, self.group_size)
        return 8 * rows * -(-width // PER_BYTE) + scales * self.scale_dtype.itemsize * 8

    def fit(self, weight: Tensor, *, importance: Tensor | None = None) -> TernaryGrid:
        """The scales of least sum of h (w - s c)^2 over all codes c of -1, 0, 1 for `weight` [out, in].

        The best k weights to keep are the k largest, whatever the importance h ([in] or [out, in], not negative): their
        scale is sum h|w| / sum h, and they lower the error by (sum h|w|)^2 / sum h; every k is tried. (The paper takes
        the threshold 0.7 mean|w| instead.) Raises LilliputError for NaN or infinity, or a scale above the scale dtype.
        """
        rows, width = weight.shape
        weigh = relative(weight, importance)
        weigh = weight.new_ones(1, width) if weigh is None else weigh
        if not bool(torch.isfinite(weight.sum())):
            raise LilliputError("the weight contains NaN or infinity: it cannot be quantized")
        weigh = weigh.expand(rows, width)
        scale = torch.empty(rows, groups.count(width, self.group_size), device=weight.device)
        step = max(1, _CHUNK // max(width, 1))
        for a in range(0, rows, step):
            scale[a : a + step] = self._scales(weight[a : a + step].float(), weigh[a : a + step].float())
        stored_scale = as_stored(scale, self.scale_dtype)
        if not bool(torch.isfinite(stored_scale).all()):
            name = dtype_name(self.scale_dtype)
            raise LilliputError(f"a scale exceeds the range of {name}: set scale_dtype to float32 for this layer")
        return TernaryGrid(stored_scale.to(self.scale_dtype))

    def _scales(self, weight: Tensor, weigh: Tensor) -> Tensor:
        """The scales [rows, groups] of some rows, before they are rounded."""
        rows, width = weight.shape
        size = width if self.group_size < 0 else min(self.group_size, width)
        room = (0, -width % max(size, 1))
        units, h = (pad(x, room).view(rows, -1, size) for x in (weight, weigh))
        size_of, order = units.abs().sort(dim=-1, descending=True, stable=True)
        h = h.gather(-1, order)
        total, count = (h * size_of).cumsum(-1), h.cumsum(-1)
        gain = torch.where(count > 0, total.square() / count, 0.0)
        best = gain.argmax(-1, keepdim=True)
        return torch.where(count > 0, total / count, 0.0).gather(-1, best).squeeze(-1)

    def encode(self, weight: Tensor, grid: TernaryGrid) -> Tensor:
        """The nearest codes, int8 [out, in] of -1, 0, 1; |w| = s / 2 goes to 0."""
        scale = grid.scale.float()[:, groups.index(weight.shape[1], self.group_size, weight.device)]
        return torch.round(weight.float() / scale).clamp_(-1, 1).to(torch.int8)

    def decode(self, codes: Tensor, grid: TernaryGrid) -> Tensor:
        """The values of codes [out, in], float32."""
        return codes * grid.scale.float()[:, groups.index(codes.shape[1], self.group_size, codes.device)]

    def levels(self, grid: TernaryGrid) -> Tensor:
        """The three values of each group, rising, float32 [out, groups, 3]."""
        return grid.scale.float().unsqueeze(-1) * torch.tensor([-1.0, 0.0, 1.0], device=grid.scale.device)

    def stored(self, rows: int, width: int) -> Stored:
        """See docs/native-format.md, kind "ternary"."""
        return {
            "": (torch.uint8, (rows * -(-width // PER_BYTE),)),
            "_scale": (self.scale_dtype, (rows, groups.count(width, self.group_size))),
        }

    def pack(self, codes: Tensor, grid: TernaryGrid) -> dict[str, Tensor]:
        """The tensors that `stored` describes."""
        return {"": pack_ternary(codes).view(-1), "_scale": grid.scale.contiguous()}

    def unpack(
        self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int
    ) -> tuple[Tensor, TernaryGrid]:
        """Codes and grid of rows [start, stop) of a [rows, width] matrix; `get` returns a stored tensor by suffix."""
        return unpack_ternary(get("").view(rows, -1)[start:stop], width), TernaryGrid(get("_scale")[start:stop])

    def plain(self) -> dict[str, Any]:
        """The entry of config.json."""
        return {"kind": "ternary", "group_size": self.group_size, "scale_dtype": dtype_name(self.scale_dtype)}


def pack_ternary(codes: Tensor) -> Tensor:
    """Codes -1, 0, 1 [rows, width] to uint8 [rows, ceil(width / 5)]: the sum of (code + 1) 3^i over five neighbours."""
    rows, width = codes.shape
    digits = pad(codes.to(torch.uint8) + 1, (0, -width % PER_BYTE)).view(rows, -1, PER_BYTE)
    packed = digits[..., -1].clone()
    for i in range(PER_BYTE - 2, -1, -1):  # five digits are 242 at most
        packed.mul_(3).add_(digits[..., i])
    return packed


def unpack_ternary(packed: Tensor, width: int) -> Tensor:
    """Undo `pack_ternary`: int8 [rows, width]."""
    powers = (3 ** torch.arange(PER_BYTE, device=packed.device)).to(torch.uint8)
    digits = torch.div(packed.unsqueeze(-1), powers, rounding_mode="floor") % 3
    return (digits.to(torch.int8) - 1).view(len(packed), -1)[:, :width]


def from_plain(plain: Mapping[str, Any]) -> TernaryFormat:
    """Undo `TernaryFormat.plain`."""
    return TernaryFormat(plain["group_size"], dtype_of(plain["scale_dtype"]))


def from_target(target: Target) -> TernaryFormat:
    """The ternary grid of a resolved target, whose bits are not read. Raises PlanError for a grid per tensor."""
    return TernaryFormat(integer.group_of(target), integer.scale_dtype_of(target))


FAMILY = Family(
    wanted={"ternary": from_target}, written={"ternary": from_plain}, completed=partial(fixed_bits, bits="1.6")
)
