"""A stored transform that splits channels into copies and merges others, at the same width.

Channel c becomes n_c copies of x_c / n_c, and every output is a copy, or the mean of two channels that are not split.
It is no bijection: `undo` is the pseudoinverse, which gives back what went in where what was merged was equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lilliput.formats.format import Stored
from lilliput.parts.part import Get

SOURCE, PLACE = "_source", "_place"


@dataclass(frozen=True)
class ReassembledSpec:
    """`extra`: copies beyond one of each channel, and so as many merges, at most."""

    extra: int

    def describe(self) -> str:
        return f"up to {self.extra} channels split and merged"

    def stored(self, width: int) -> Stored:
        count = width + self.extra
        return {SOURCE: (torch.int32, (count,)), PLACE: (torch.int32, (count,))}

    def operations(self, width: int) -> int:
        return 2 * (width + self.extra)

    def load(self, width: int, get: Get) -> Reassembled:
        return Reassembled(get(SOURCE), get(PLACE), width)

    def plain(self) -> dict[str, Any]:
        return {"kind": "reassembled", "extra": self.extra}


@dataclass(frozen=True)
class Reassembled:
    """Copy k is of channel `source[k]` and goes to output `place[k]`, int32 [width + extra]; -1: there is no such
    copy. Every channel has a copy and every output one or two."""

    source: Tensor
    place: Tensor
    width: int

    @property
    def spec(self) -> ReassembledSpec:
        return ReassembledSpec(len(self.source) - self.width)

    @cached_property
    def _copies(self) -> tuple[Tensor, Tensor, Tensor]:
        """Channel and output of each copy, int64, and its share of the output, float64."""
        there = self.source >= 0
        source, place = self.source[there].long(), self.place[there].long()
        counts = source.bincount(minlength=self.width)[source] * place.bincount(minlength=self.width)[place]
        return source, place, 1.0 / counts.double()

    def _moved(self, x: Tensor, back: bool, shares: bool) -> Tensor:
        """Sums over copies, from channels to outputs or back."""
        source, place, share = (t.to(x.device) for t in self._copies)
        start, end = (place, source) if back else (source, place)
        copies = x[..., start] * share.to(x) if shares else x[..., start]
        return x.new_zeros(*x.shape[:-1], self.width).index_add_(-1, end, copies)

    def apply(self, x: Tensor) -> Tensor:
        return self._moved(x, back=False, shares=True)

    def undo(self, x: Tensor) -> Tensor:
        return self._moved(x, back=True, shares=False)

    def adjoint(self, x: Tensor) -> Tensor:
        return self._moved(x, back=True, shares=True)

    def undo_adjoint(self, x: Tensor) -> Tensor:
        return self._moved(x, back=False, shares=False)

    def pack(self) -> dict[str, Tensor]:
        return {SOURCE: self.source.contiguous(), PLACE: self.place.contiguous()}
