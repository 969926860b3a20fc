"""Layer: what a step sees and returns for one linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lilliput.errors import LilliputError
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.part import Part
from lilliput.parts.transform import Transform, turn, turn_back


@dataclass(frozen=True)
class Layer:
    """One linear layer under compression.

    `weight` is the weight to approximate, float32 [out, in]; `parts` the terms so far; `support` a boolean
    [out, in] mask outside of which no step may write (None: everywhere). A step fits `rest()` and adds a part.
    `updated`, float32 [out, in], holds what a pruning step has made of the weights that it kept: the layer's values
    while it has no parts. `rest()` stays that of `weight`, so that a step that quantizes solves anew on the support.
    `inputs` and `outputs` are run-time transforms: the parts add up to T_out W T_in^-1. `activation`: how what the
    input transforms give is rounded. `fisher` [out, in] is the mean
    square of the loss's gradient for each weight, where a method needs it.
    """

    name: str
    weight: Tensor
    parts: tuple[Part, ...] = ()
    support: Tensor | None = None
    inputs: tuple[Transform, ...] = ()
    outputs: tuple[Transform, ...] = ()
    fisher: Tensor | None = None
    updated: Tensor | None = None
    activation: InputGrid | None = None

    def need_fisher(self) -> Tensor:
        """The Fisher information, float32 [out, in].

        Raises RuntimeError where the method that reads it did not declare it in needs, LilliputError where it holds NaN
        or infinity.
        """
        if self.fisher is None:
            raise RuntimeError("the Fisher information was read but not collected: declare 'fisher' in its needs")
        if not bool(torch.isfinite(self.fisher).all()):
            raise LilliputError(f"the Fisher information of {self.name} contains NaN or infinity: check the data")
        return self.fisher

    def need_support(self) -> Tensor:
        """The mask that an earlier step has chosen, bool [out, in]. Raises LilliputError where there is none."""
        if self.support is None:
            raise LilliputError(
                f"{self.name} is not pruned: put a step that prunes before the one that refines its zeros"
            )
        return self.support

    def rest(self) -> Tensor:
        """What the parts leave over, float32 [out, in], between the transforms."""
        rest = turn(self.weight, self.inputs, self.outputs)
        for part in self.parts:
            rest = rest - part.decode()
        return rest

    def decode(self) -> Tensor:
        """The layer as it will be stored: the sum of its parts, or, without parts, the supported weight."""
        if self.parts:
            total = self.parts[0].decode()
            for part in self.parts[1:]:
                total = total + part.decode()
            return turn_back(total, self.inputs, self.outputs)
        values = self.weight if self.updated is None else self.updated
        return values if self.support is None else torch.where(self.support, values, 0.0)

    def with_part(self, *parts: Part) -> Layer:
        return replace(self, parts=(*self.parts, *parts))

    def with_support(self, mask: Tensor, updated: Tensor | None = None) -> Layer:
        """The layer with zeros outside `mask`; `updated`: new values of the weights inside (None: their own)."""
        return replace(self, support=mask if self.support is None else self.support & mask, updated=updated)

    def refined(self, mask: Tensor, updated: Tensor | None = None) -> Layer:
        """The layer with `mask` in place of its support; `updated` as in `with_support`."""
        return replace(self, support=mask, updated=updated)

    def between(self, inputs: Sequence[Transform] = (), outputs: Sequence[Transform] = ()) -> Layer:
        """The layer with further transforms around its parts.

        Raises ValueError where parts or a support exist: they were made for the weight as it was.
        """
        if self.parts or self.support is not None:
            raise ValueError("transforms come before all parts, and a mask does not survive them")
        return replace(self, inputs=(*self.inputs, *inputs), outputs=(*self.outputs, *outputs))

    def rows(self, start: int, stop: int, name: str) -> Layer:
        """Output rows [start, stop) as a layer of their own. Raises ValueError where outputs are mixed."""
        if self.outputs:
            raise ValueError("the rows of a layer whose outputs are transformed belong together")
        return replace(
            self,
            name=name,
            weight=self.weight[start:stop],
            parts=tuple(p.rows(start, stop) for p in self.parts),
            support=None if self.support is None else self.support[start:stop],
            fisher=None if self.fisher is None else self.fisher[start:stop],
            updated=None if self.updated is None else self.updated[start:stop],
        )


def stack(layers: Sequence[Layer]) -> Layer:
    """Layers that read one site, as one layer with their rows below each other (before any has parts)."""
    if len(layers) == 1:
        return layers[0]
    if any(layer.parts or layer.inputs or layer.outputs or layer.activation for layer in layers):
        raise ValueError("only layers without parts, transforms and grids for inputs can be stacked")
    name = "+".join(layer.name for layer in layers)
    support = None
    if any(layer.support is not None for layer in layers):
        ones = [torch.ones_like(x.weight, dtype=torch.bool) if x.support is None else x.support for x in layers]
        support = torch.cat(ones)
    fishers = [layer.fisher for layer in layers if layer.fisher is not None]
    fisher = torch.cat(fishers) if len(fishers) == len(layers) else None
    updated = None
    if any(layer.updated is not None for layer in layers):
        updated = torch.cat([x.weight if x.updated is None else x.updated for x in layers])
    weight = torch.cat([layer.weight for layer in layers])
    return Layer(name, weight, support=support, fisher=fisher, updated=updated)


def split(layer: Layer, sizes: Sequence[tuple[str, int]]) -> list[Layer]:
    """Undo `stack`: (name, rows) pairs in order. One layer stays as it is."""
    if len(sizes) == 1:
        return [replace(layer, name=sizes[0][0])]
    out: list[Layer] = []
    start = 0
    for name, rows in sizes:
        out.append(layer.rows(start, start + rows, name))
        start += rows
    return out
