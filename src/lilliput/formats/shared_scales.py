"""Scales that are integers of few bits, times and plus what several of them share. `formats.scales` says what the kinds
are for and what each function owes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lilliput.formats.bits import pack_bits, row_bytes, unpack_bits
from lilliput.formats.format import Stored

Second = tuple[Tensor, ...]
Get = Callable[[str], Tensor]
TINY = 2.0**-126  # the smallest normal float32: its reciprocal is finite


@dataclass(frozen=True)
class BlockScales:
    """mean + code * absmax / 127, codes -127 .. 127; absmax for each `block` scales, row after row."""

    block: int
    shared: Literal["matrix"] = "matrix"

    @property
    def name(self) -> str:
        return f"int8/{self.block}"

    def second(self, peak: Tensor, top: float) -> Second:
        scale = filled(peak) / top
        mean = scale.mean(dtype=torch.float64).float()
        away = (scale - mean).abs().reshape(-1)
        padded = torch.nn.functional.pad(away, (0, -len(away) % self.block)).view(-1, self.block)
        return mean.reshape(1), padded.amax(1)

    def coded(self, peak: Tensor, top: float, second: Second) -> Tensor:
        step = self._steps(second[1], 0, peak.shape)
        away = (filled(peak) / top - second[0]) / torch.where(step > 0, step, 1.0)
        return away.round_().clamp_(-127, 127).to(torch.int16)

    def values(self, codes: Tensor, second: Second) -> Tensor:
        first = 0 if len(second) == 2 else int(second[2])
        return (second[0] + codes * self._steps(second[1], first, codes.shape)).clamp_(min=TINY)

    def shifted(self, codes: Tensor, by: int) -> Tensor:
        return (codes + by).clamp_(-127, 127)

    def rows(self, second: Second, start: int, stop: int) -> Second:
        raise ValueError(f"rows share blocks of {self.block} scales: they cannot be cut apart")

    def size_bits(self, rows: int, groups: int) -> int:
        return rows * groups * 8 + -(-rows * groups // self.block) * 32 + 32

    def stored(self, rows: int, groups: int) -> Stored:
        blocks = -(-rows * groups // self.block)
        return {
            "": (torch.int8, (rows, groups)),
            "_mean": (torch.float32, (1,)),
            "_absmax": (torch.float32, (blocks,)),
        }

    def pack(self, codes: Tensor, second: Second) -> dict[str, Tensor]:
        return {"": codes.to(torch.int8).contiguous(), "_mean": second[0], "_absmax": second[1]}

    def unpack(self, get: Get, rows: int, groups: int, start: int, stop: int) -> tuple[Tensor, Second]:
        first = torch.tensor(start * groups)  # where the rows begin among the blocks
        return get("")[start:stop].to(torch.int16), (get("_mean"), get("_absmax"), first)

    def _steps(self, absmax: Tensor, first: int, shape: torch.Size) -> Tensor:
        at = torch.arange(first, first + shape.numel(), device=absmax.device) // self.block
        return (absmax / 127.0)[at].view(shape)


@dataclass(frozen=True)
class RowScales:
    """(code + 1) * step with a step for each output row: an integer of 1 .. 2^bits, so that no group is lost."""

    bits: int
    shared: Literal["row"] = "row"

    @property
    def name(self) -> str:
        return f"int{self.bits}/row"

    def second(self, peak: Tensor, top: float) -> Second:
        return (filled(peak).amax(1, keepdim=True).div(top * (1 << self.bits)).clamp_(min=TINY),)

    def coded(self, peak: Tensor, top: float, second: Second) -> Tensor:
        code = torch.round(filled(peak) / top / second[0]) - 1
        return code.clamp_(0, (1 << self.bits) - 1).to(torch.int16)

    def values(self, codes: Tensor, second: Second) -> Tensor:
        return (codes + 1) * second[0]

    def shifted(self, codes: Tensor, by: int) -> Tensor:
        return (codes + by).clamp_(0, (1 << self.bits) - 1)

    def rows(self, second: Second, start: int, stop: int) -> Second:
        return (second[0][start:stop],)

    def size_bits(self, rows: int, groups: int) -> int:
        return rows * groups * self.bits + rows * 32

    def stored(self, rows: int, groups: int) -> Stored:
        return {"": (torch.uint8, (rows, row_bytes(groups, self.bits))), "_step": (torch.float32, (rows, 1))}

    def pack(self, codes: Tensor, second: Second) -> dict[str, Tensor]:
        return {"": _pack(codes, self.bits), "_step": second[0].contiguous()}

    def unpack(self, get: Get, rows: int, groups: int, start: int, stop: int) -> tuple[Tensor, Second]:
        return _unpack(get("")[start:stop], self.bits, groups), (get("_step")[start:stop],)


@dataclass(frozen=True)
class AffineScales:
    """low + code * step, float16 low and step for each `block` consecutive groups of a row; the last block of a row may
    be shorter. Not `positive`: of any sign, for zero points."""

    bits: int
    block: int
    positive: bool = True
    shared: Literal["row"] = "row"

    @property
    def name(self) -> str:
        return f"int{self.bits}/{self.block}"

    def second(self, peak: Tensor, top: float) -> Second:
        scale = (filled(peak) if self.positive else peak) / top
        blocks = -(-scale.shape[1] // self.block)
        padded = torch.nn.functional.pad(scale, (0, blocks * self.block - scale.shape[1]), value=float("nan"))
        padded = padded.view(len(scale), blocks, self.block)
        low = padded.nan_to_num(nan=float("inf")).amin(2)
        high = padded.nan_to_num(nan=float("-inf")).amax(2)
        low = low.half()
        return low, ((high - low.float()) / ((1 << self.bits) - 1)).half()

    def coded(self, peak: Tensor, top: float, second: Second) -> Tensor:
        low, step = (self._spread(x, peak.shape[1]) for x in second)
        scale = (filled(peak) if self.positive else peak) / top
        code = torch.round((scale - low) / torch.where(step > 0, step, 1.0))
        return code.clamp_(0, (1 << self.bits) - 1).to(torch.int16)

    def values(self, codes: Tensor, second: Second) -> Tensor:
        low, step = (self._spread(x, codes.shape[1]) for x in second)
        value = low + codes * step
        return value.clamp_(min=2.0**-24) if self.positive else value

    def shifted(self, codes: Tensor, by: int) -> Tensor:
        return (codes + by).clamp_(0, (1 << self.bits) - 1)

    def rows(self, second: Second, start: int, stop: int) -> Second:
        return tuple(x[start:stop] for x in second)

    def size_bits(self, rows: int, groups: int) -> int:
        return rows * groups * self.bits + rows * -(-groups // self.block) * 32

    def stored(self, rows: int, groups: int) -> Stored:
        shared = (torch.float16, (rows, -(-groups // self.block)))
        return {"": (torch.uint8, (rows, row_bytes(groups, self.bits))), "_low": shared, "_step": shared}

    def pack(self, codes: Tensor, second: Second) -> dict[str, Tensor]:
        low, step = (x.contiguous() for x in second)
        return {"": _pack(codes, self.bits), "_low": low, "_step": step}

    def unpack(self, get: Get, rows: int, groups: int, start: int, stop: int) -> tuple[Tensor, Second]:
        return _unpack(get("")[start:stop], self.bits, groups), (get("_low")[start:stop], get("_step")[start:stop])

    def _spread(self, shared: Tensor, groups: int) -> Tensor:
        return shared.float().repeat_interleave(self.block, 1)[:, :groups]


def filled(peak: Tensor) -> Tensor:
    """Groups of zeros, whose scale is anyone's choice, take the mean of the others of their row (1: none has one)."""
    some = peak > 0
    mean = peak.sum(1, keepdim=True) / some.sum(1, keepdim=True).clamp(min=1)
    return torch.where(some, peak, torch.where(mean > 0, mean, 1.0))


def _pack(codes: Tensor, bits: int) -> Tensor:
    return pack_bits(codes - (1 << (bits - 1)), bits)


def _unpack(packed: Tensor, bits: int, groups: int) -> Tensor:
    return unpack_bits(packed, bits, groups).to(torch.int16) + (1 << (bits - 1))
