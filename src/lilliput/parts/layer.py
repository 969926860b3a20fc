"""Layer: what a step sees and returns for one linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lilliput.parts.part import Part


@dataclass(frozen=True)
class Layer:
    """One linear layer under compression.

    `weight` is the weight to approximate, float32 [out, in]; `parts` the terms so far; `support` a boolean
    [out, in] mask outside of which no step may write (None: everywhere). A step fits `rest()` and adds a part.
    """

    name: str
    weight: Tensor
    parts: tuple[Part, ...] = ()
    support: Tensor | None = None

    def rest(self) -> Tensor:
        """What the parts leave over, float32 [out, in]."""
        left = self.weight
        for part in self.parts:
            left = left - part.decode()
        return left

    def decode(self) -> Tensor:
        """The layer as it will be stored: the sum of its parts, or, without parts, the supported weight."""
        if self.parts:
            total = self.parts[0].decode()
            for part in self.parts[1:]:
                total = total + part.decode()
            return total
        return self.weight if self.support is None else torch.where(self.support, self.weight, 0.0)

    def with_part(self, part: Part) -> Layer:
        return replace(self, parts=(*self.parts, part))

    def with_support(self, mask: Tensor) -> Layer:
        return replace(self, support=mask if self.support is None else self.support & mask)

    def rows(self, start: int, stop: int, name: str) -> Layer:
        """Output rows [start, stop) as a layer of their own."""
        support = None if self.support is None else self.support[start:stop]
        return Layer(name, self.weight[start:stop], tuple(p.rows(start, stop) for p in self.parts), support)


def stack(layers: Sequence[Layer]) -> Layer:
    """Layers that read one site, as one layer with their rows below each other (before any has parts)."""
    if len(layers) == 1:
        return layers[0]
    if any(layer.parts for layer in layers):
        raise ValueError("only layers without parts can be stacked")
    name = "+".join(layer.name for layer in layers)
    support = None
    if any(layer.support is not None for layer in layers):
        ones = [torch.ones_like(x.weight, dtype=torch.bool) if x.support is None else x.support for x in layers]
        support = torch.cat(ones)
    return Layer(name, torch.cat([layer.weight for layer in layers]), support=support)


def split(layer: Layer, sizes: Sequence[tuple[str, int]]) -> list[Layer]:
    """Undo `stack`: (name, rows) pairs in order."""
    out: list[Layer] = []
    start = 0
    for name, rows in sizes:
        out.append(layer.rows(start, start + rows, name))
        start += rows
    return out
