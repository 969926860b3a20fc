"""What a grid for a linear's inputs is to the rest: something that rounds them, and says what it stores.

A spec is frozen and known before any text is read; a grid is a spec with its values, which a dynamic one does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lilliput.formats.format import Stored
from lilliput.parts.part import Get


class InputSpec(Protocol):
    """How inputs are rounded. Suffixes of stored tensors begin with "_"."""

    @property
    def bits(self) -> float:
        """Of the code of one input; scales come on top."""
        ...

    def describe(self) -> str:
        """For tables: "int8 token"."""
        ...

    @property
    def alike(self) -> bool:
        """Whether equal inputs of a token become equal values, whichever channels they are."""
        ...

    def stored(self, width: int) -> Stored:
        """Tensors in the file, by suffix; none where everything is found while the model runs."""
        ...

    def round(self, x: Tensor, get: Get) -> Tensor:
        """The nearest values that the grid has, of x float32 [.., width]; `get` returns a stored tensor by suffix."""
        ...

    def plain(self) -> dict[str, Any]:
        """The entry of config.json, with the grid's `kind`; `known.from_plain` reads it back."""
        ...


@dataclass(frozen=True)
class InputGrid:
    """A spec with its stored tensors, by suffix."""

    spec: InputSpec
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def round(self, x: Tensor) -> Tensor:
        """x [.., width] on the grid, in x's dtype; gradients pass as if nothing were rounded."""
        if not x.numel():  # an expert without tokens
            return x
        with torch.no_grad():
            values = self.spec.round(x.detach().float(), lambda suffix: self.tensors[suffix].to(x.device)).to(x.dtype)
        return x + (values - x).detach() if torch.is_grad_enabled() and x.requires_grad else values

    def pack(self) -> dict[str, Tensor]:
        """The tensors that `spec.stored` describes."""
        return {suffix: x.contiguous() for suffix, x in self.tensors.items()}
