"""Trellis codes: each column of a matrix is a walk through the states of a shift register (`algebra.trellis`).

Like vector codebooks, walks run down the outputs. Long columns are cut into walks of about 256 rows, all but the last
of one even length. "trellis" has `bits` bits a weight, "trellis-half" half a bit more. The code of a weight is the
register that names its number, so rows can be cut anywhere; a file holds the bits that were shifted in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lilliput.algebra import compiled, ldlq, trellis
from lilliput.errors import PlanError
from lilliput.formats.bits import pack_unsigned, row_bytes, unpack_unsigned
from lilliput.formats.format import Family, Format, Stored, dtype_name, dtype_of
from lilliput.formats.vector import VectorGrid, by_column, checked, each_row, rms_scale, unit_of
from lilliput.machine.cost import Cost
from lilliput.target import Target

_WALK = 256  # rows; each walk begins at register 0, where little can be chosen yet, and is the work of one core
_ROOM = 1 << 23  # numbers of a table of costs that is kept at a time


@dataclass(frozen=True)
class TrellisFormat(Format):
    """`half_bits`: twice the bits of a weight, 2 to 10; `window`: bits of the register.

    Raises PlanError for other bits, and a window that is not 8 to 16.
    """

    holds_zero: ClassVar[bool] = False

    half_bits: int
    per_row: bool
    scale_dtype: torch.dtype = torch.float16
    window: int = 11

    def __post_init__(self) -> None:
        checked(self.scale_dtype)
        if not 2 <= self.half_bits <= 10:
            raise PlanError(f"{self.half_bits / 2:g} bits: trellis codes have 1 to 5 bits in steps of a half")
        if not 8 <= self.window <= 16:
            raise PlanError(f"a register of {self.window} bits: choose 8 to 16")

    def cost(self, rows: int, width: int) -> Cost:
        """What encoding works in whatever the shape; 2^window operations for each weight find the best walk once."""
        ram = compiled.MEMORY if compiled.available() else 4 * max(_ROOM, 2 * _WALK << self.window)
        return Cost(ram=ram, operations=rows * width << self.window)

    def remark(self) -> str | None:
        """See `Format`."""
        if compiled.available():
            return None
        return "trellis codes take twenty times as long without numba: pip install 'lilliput[fast]'."

    @property
    def steps(self) -> tuple[int, int]:
        """Bits of a weight in an even and in an odd row of a walk."""
        return self.half_bits // 2, (self.half_bits + 1) // 2

    def describe(self) -> str:
        return f"trellis{self.half_bits / 2:g} {'row' if self.per_row else 'tensor'}"

    def walk(self, rows: int) -> int:
        """Rows of each walk but the last; even."""
        count = max(1, round(rows / _WALK))
        return -(-rows // (2 * count)) * 2

    def size_bits(self, rows: int, width: int) -> int:
        return -(-rows // 2) * width * self.half_bits + (rows if self.per_row else 1) * self.scale_dtype.itemsize * 8

    def fit(self, weight: Tensor, *, importance: Tensor | None = None) -> VectorGrid:
        """Scales from root mean squares. Raises LilliputError for NaN or infinity."""
        return VectorGrid(rms_scale(weight, self.per_row, 1.0, self.scale_dtype))

    def encode(self, weight: Tensor, grid: VectorGrid) -> Tensor:
        """Codes of the nearest walks, int32 [out, in]; scales of rows within a walk are not weighed."""
        rows, width = weight.shape
        walk = self.walk(rows)
        scaled = weight.float() / grid.scale.float()
        if rows % walk:
            scaled = torch.nn.functional.pad(scaled, (0, 0, 0, -rows % walk))
        columns = scaled.T.reshape(-1, walk)
        step = max(1, _ROOM // (walk << self.window))
        pieces = [
            trellis.best_path(columns[a : a + step], self.window, self.steps) for a in range(0, len(columns), step)
        ]
        path = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return path.view(width, -1).T[:rows].to(torch.int32)

    def decode(self, codes: Tensor, grid: VectorGrid) -> Tensor:
        return trellis.table(self.window).to(codes.device)[codes.long()] * grid.scale.float()

    def settle(self, grid: VectorGrid, rows: int) -> ldlq.Settle:
        """How a sweep rounds columns of `rows` weights."""
        if grid.scale.device.type != "cpu" or not compiled.available():
            return by_column(self, grid)
        numbers = trellis.table(self.window)
        return functools.partial(compiled.settle_paths, numbers, self.steps, self.walk(rows), each_row(grid, rows))

    def stored(self, rows: int, width: int) -> Stored:
        """See docs/native-format.md, kind "trellis"."""
        return {
            "": (torch.uint8, (-(-rows // 2) * row_bytes(width, self.half_bits),)),
            "_scale": (self.scale_dtype, (rows if self.per_row else 1, 1)),
        }

    def pack(self, codes: Tensor, grid: VectorGrid) -> dict[str, Tensor]:
        low, high = self.steps
        even = codes[0::2] & ((1 << low) - 1)
        odd = torch.zeros_like(even)
        odd[: len(codes) // 2] = codes[1::2] & ((1 << high) - 1)
        packed = pack_unsigned(even << high | odd, self.half_bits).flatten()
        return {"": packed, "_scale": grid.scale.to(self.scale_dtype).contiguous()}

    def unpack(
        self, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int
    ) -> tuple[Tensor, VectorGrid]:
        _, high = self.steps
        walk = self.walk(rows)
        first = start - start % walk  # the register is known where a walk begins
        packed = get("").view(-(-rows // 2), -1)[first // 2 : -(-stop // 2)]
        pair = unpack_unsigned(packed, self.half_bits, width)
        symbols = torch.stack((pair >> high, pair & ((1 << high) - 1)), 1).flatten(0, 1)
        padded = torch.nn.functional.pad(symbols, (0, 0, 0, -len(symbols) % walk)).view(-1, walk, width)
        codes = trellis.registers(padded, self.window, self.steps).flatten(0, 1)
        return codes[start - first : stop - first].to(torch.int32), VectorGrid(get("_scale")).rows(start, stop)

    def plain(self) -> dict[str, Any]:
        return {
            "kind": "trellis",
            "half_bits": self.half_bits,
            "window": self.window,
            "per_row": self.per_row,
            "scale_dtype": dtype_name(self.scale_dtype),
        }


def from_plain(plain: Mapping[str, Any]) -> TrellisFormat:
    """Undo `TrellisFormat.plain`."""
    return TrellisFormat(plain["half_bits"], plain["per_row"], dtype_of(plain["scale_dtype"]), plain["window"])


def from_target(target: Target) -> TrellisFormat:
    """Trellis codes for a resolved target. Raises PlanError without bits, above 5 and for groups of inputs."""
    return _made(target, 0)


def half_from_target(target: Target) -> TrellisFormat:
    """Trellis codes of half a bit more than the target says."""
    return _made(target, 1)


def _made(target: Target, more: int) -> TrellisFormat:
    if target.bits is None:
        raise PlanError(f"a quantizing step needs the number of bits: set target.bits to 2..{5 - more}")
    return TrellisFormat(2 * target.bits + more, *unit_of(target, target.format))


FAMILY = Family(wanted={"trellis": from_target, "trellis-half": half_from_target}, written={"trellis": from_plain})
