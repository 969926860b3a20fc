"""The rotations that a model gives its keys by position, undone and done again by the model's own function."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lilliput.errors import SourceError

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
FUNCTION = "apply_rotary_pos_emb"
ARGUMENT = "position_embeddings"


class Table:
    """Cosines and sines of the positions of one cache, which all of its layers share; rows are only ever added."""

    def __init__(self) -> None:
        self.cos = self.sin = torch.empty(0)
        self._latest: tuple[Tensor, Tensor] | None = None

    def add(self, cos: Tensor, sin: Tensor) -> Tensor:
        """Rows of new tokens, cos and sin [batch or 1, tokens, width]: their numbers, int32 [batch or 1, tokens]."""
        if self._latest is not None:
            seen, index = self._latest
            if seen is cos or (seen.shape == cos.shape and seen.device == cos.device and torch.equal(seen, cos)):
                return index
        first = len(self.cos)
        if len(cos) == 1 or torch.equal(cos, cos[:1].expand_as(cos)):
            rows, turned = cos[0], sin[0]
            index = torch.arange(first, first + len(rows), device=cos.device, dtype=torch.int32)[None]
        else:  # padded: sequences are at other positions, of which most occur in several of them
            both = torch.cat([cos, sin], dim=-1).flatten(0, 1)
            unique, inverse = both.unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
            rows, turned = unique.chunk(2, dim=-1)
            index = (inverse + first).to(torch.int32).view(cos.shape[:2])
        self.cos = torch.cat([self.cos.to(rows), rows])
        self.sin = torch.cat([self.sin.to(rows), turned])
        self._latest = cos, index
        return index

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [.., tokens, width] of rows [.., tokens]."""
        rows = index.to(self.cos.device).long()
        return self.cos[rows].to(index.device), self.sin[rows].to(index.device)


@dataclass(frozen=True)
class Turn:
    """What the keys of a call were rotated by: cos, sin [batch or 1, tokens, width], the table of the cache, and the
    model's function."""

    cos: Tensor
    sin: Tensor
    table: Table
    rotate: Rotate


def undo(x: Tensor, cos: Tensor, sin: Tensor, rotate: Rotate) -> Tensor:
    """Keys [batch, heads, tokens, width] before their rotation, which may have scaled them too."""
    size = cos.square() + sin.square()
    return rotate(x, cos / size, -sin / size)


def rotation(attention: nn.Module) -> Rotate | None:
    """The function by which an attention rotates its keys: (x [batch, heads, tokens, width], cos, sin) to x; None where
    positions are not rotated. Raises SourceError where they are by a function that cannot be found."""
    refusal = f"so the keys of {type(attention).__name__} cannot be stored as they were before: choose kivi or kv-rtn"
    if ARGUMENT not in inspect.signature(attention.forward).parameters:
        inside = [n for n, _ in attention.named_modules() if "rotary" in n] or hasattr(attention, "rotary_dim")
        if inside:
            raise SourceError(f"it rotates them itself, {refusal}")
        return None
    if getattr(attention, "kv_lora_rank", None) is not None:
        raise SourceError(f"it stores what keys are made of, which is not rotated, {refusal}")
    home = next((x.__module__ for x in type(attention).__mro__ if hasattr(sys.modules[x.__module__], FUNCTION)), None)
    function = None if home is None else getattr(sys.modules[home], FUNCTION)
    if function is None or list(inspect.signature(function).parameters)[2:4] != ["cos", "sin"]:
        raise SourceError(f"it rotates by no function {FUNCTION}(q, k, cos, sin), {refusal}")

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.float(), sin.float()
        width = cos.shape[-1]
        if width in (x.shape[-1], x.shape[-1] // 2) and not (width < x.shape[-1] and _partial(function, x, cos, sin)):
            out: Tensor = function(x, x, cos, sin)[1]
            return out
        out = function(x[..., :width], x[..., :width], cos, sin)[1]
        return torch.cat([out, x[..., width:]], dim=-1)

    return rotate


def _partial(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether half as many cosines as channels mean that only half of the channels rotate."""
    try:
        function(x[:1, :1, :1], x[:1, :1, :1], cos[:1, :1], sin[:1, :1])
    except RuntimeError:
        return True
    return False
