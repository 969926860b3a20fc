"""What training steps that move zeros share: weights under a mask that closes by a schedule, to a planned number.

How many weights of a linear are stored, or which pattern they have, a step before has fixed (`magnitude`, or the folder
that is trained). Training begins with the share `sparse_from` of zeros and ends with exactly what is planned; between
`begin` and `until`, shares of the training, the share of zeros at the time u in [0, 1] is

    s(u) = s + (s_0 - s) (1 - u)^3,

and every `every` steps those weights stay whose scores are highest, among the whole linear, or of every M inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lilliput.algebra import masks
from lilliput.errors import LilliputError
from lilliput.parts import kept
from lilliput.parts.bitmask import BitmaskSpec
from lilliput.parts.dense import DenseSpec
from lilliput.parts.layer import Layer
from lilliput.parts.part import PartSpec
from lilliput.parts.pattern import PatternSpec
from lilliput.parts.scheme import Scheme
from lilliput.parts.tiles import TilesSpec
from lilliput.verbs.train import TrainOptions
from lilliput.verbs.trained import Trained


class SparseOptions(TrainOptions):
    """What every step that moves zeros can be told."""

    sparse_from: float = Field(0.0, ge=0.0, le=1.0, description="share of zeros at the start; at most the planned one")
    begin: float = Field(0.0, ge=0.0, lt=1.0, description="share of the training after which zeros become more")
    until: float = Field(0.7, gt=0.0, le=1.0, description="share of the training from which on they are as planned")
    every: int = Field(5, ge=1, description="steps between two masks")
    start: Literal["original", "pruned"] = Field(
        "original", description="where weights begin: at those of the model that was pruned, or as that step left them"
    )

    @model_validator(mode="after")
    def _ordered(self) -> SparseOptions:
        if self.begin >= self.until:
            raise ValueError("begin comes before until")
        return self


def cubic(start: float, end: float, u: float) -> float:
    """The share of zeros at the time u, 0 at the start and 1 at the end of the schedule."""
    u = min(max(u, 0.0), 1.0)
    return end + (start - end) * (1.0 - u) ** 3


class Sparse(Trained):
    """Weights float32 [out, in] under a mask. A method says how the mask scores them; it may take another `weight`."""

    mask: Tensor

    def __init__(self, layer: Layer, original: Tensor, o: SparseOptions) -> None:
        super().__init__()
        value = layer.decode()
        self.name = layer.name
        self.settings = o
        self.block = (1, 1)
        self._spec: PartSpec | None = layer.parts[0].spec if layer.parts else None
        self.register_buffer("mask", torch.ones_like(value, dtype=torch.bool))
        self.count, self.pattern = int((value != 0).sum()), pattern_in(self._spec)
        if isinstance(self._spec, BitmaskSpec | TilesSpec):
            self.count = self._spec.count

    def planned(self, count: int | None, pattern: str | None) -> None:
        if count is not None:
            self.count = count
        if pattern is not None:
            self.pattern = pattern

    def state(self) -> Mapping[str, Tensor]:
        return {"mask": self.mask}

    def scores(self) -> Tensor:
        """What decides which weights stay, [out, in], finite."""
        raise NotImplementedError

    def values(self) -> Tensor:
        """The weights before the mask, [out, in], differentiable."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        return self.values() * self.mask

    def at(self, done: float) -> float:
        """The time of the schedule, from 0 to 1, after a share of the training."""
        o = self.settings
        # Shares are steps over steps: a hair of rounding must not put the end off.
        return min(max((done - o.begin + 1e-9) / (o.until - o.begin), 0.0), 1.0)

    def step(self, done: float) -> None:
        o = self.settings
        number = round(done * o.steps)
        last = round(o.until * o.steps)
        if number <= last and (number % o.every == 0 or number == last or number == 0):
            self.mask.copy_(self.chosen(self.at(done)))

    @torch.no_grad()
    def chosen(self, u: float) -> Tensor:
        """The mask at a time of the schedule, bool [out, in]."""
        size = self.mask.numel()
        if self.pattern is not None:
            n, m = masks.pattern_of(self.pattern, self.mask.shape[1])
            stay = n + round((m - n) * (1 - cubic(self.settings.sparse_from, 1.0, u)))
            groups = self._finite().reshape(-1, m)
            return masks.largest(groups, min(m, stay)).view(self.mask.shape)
        end = 1.0 - self.count / size
        zeros = cubic(min(self.settings.sparse_from, end), end, u)
        stay = self.count if u >= 1.0 else max(self.count, size - round(zeros * size))
        return self.largest(stay)

    @torch.no_grad()
    def largest(self, stay: int) -> Tensor:
        """The mask of the highest scores of the whole linear, bool [out, in]; of blocks of weights, by their mean, as
        many as hold `stay` weights."""
        high, wide = self.block
        scores = self._finite()
        if self.block == (1, 1):
            return masks.largest(scores.reshape(1, -1), stay).view(scores.shape)
        rows, width = scores.shape
        if rows % high or width % wide or self.count % (high * wide):
            raise LilliputError(
                f"blocks of {high} x {wide} do not make up the {self.count} weights that are kept of {self.name}, "
                f"{rows} x {width}: prune it first with magnitude and the same option `block`"
            )
        means = scores.view(rows // high, high, width // wide, wide).mean((1, 3))
        stays = masks.largest(means.reshape(1, -1), -(-stay // (high * wide))).view(means.shape)
        return stays.repeat_interleave(high, 0).repeat_interleave(wide, 1)

    def _finite(self) -> Tensor:
        scores = self.scores().detach().float()
        if not bool(torch.isfinite(scores.sum(dtype=torch.float64))):
            raise LilliputError(f"the scores of {self.name} are not finite: lower lr, or check the text")
        return scores

    def _kept(self) -> int:
        if self.pattern is None:
            return self.count
        n, m = masks.pattern_of(self.pattern, self.mask.shape[1])
        return self.mask.numel() // m * n

    def settled(self) -> None:
        """Close the mask to the planned number where training has ended before its schedule did."""
        if int(self.mask.sum()) != self._kept():
            self.mask.copy_(self.chosen(1.0))

    def finish(self) -> Layer:
        self.settled()
        with torch.no_grad():
            layer = Layer(self.name, self.weight().detach().clone(), support=self.mask.clone())
        if self._spec is None:
            return layer
        return replace(layer, parts=(kept.part_of(layer, self._spec),))


class Latent(Sparse):
    """Weights that are trained themselves."""

    def __init__(self, layer: Layer, original: Tensor, o: SparseOptions) -> None:
        super().__init__(layer, original, o)
        self.value = nn.Parameter(first(layer, original, o))

    def values(self) -> Tensor:
        return self.value


def first(layer: Layer, original: Tensor, o: SparseOptions) -> Tensor:
    """The weights at the start, float32 [out, in], those that will leave among them."""
    return (original if o.start == "original" else layer.decode()).float().clone()


class Straight(torch.autograd.Function):
    """value * mask, whose gradient passes as if there were no mask."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, mask: Tensor) -> Tensor:
        return value * mask

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0], None


def straight(value: Tensor, mask: Tensor) -> Tensor:
    """See `Straight`."""
    result: Tensor = Straight.apply(value, mask)  # type: ignore[no-untyped-call]
    return result


def pattern_in(spec: PartSpec | None) -> str | None:
    """The pattern N:M by which a part is stored."""
    return f"{spec.n}:{spec.m}" if isinstance(spec, PatternSpec) else None


def restarts(o: SparseOptions) -> str | None:
    """As `Learning.restarts`."""
    return "pruned" if o.start == "original" else None


def admits(scheme: Scheme, o: Any) -> str | None:
    """Plain linears, with or without places for what is kept."""
    plain = not scheme.inputs and not scheme.outputs and scheme.activation is None and len(scheme.parts) < 2
    first = scheme.parts[0] if scheme.parts else None
    if plain and (first is None or isinstance(first, DenseSpec | BitmaskSpec | TilesSpec)):
        return None
    if plain and isinstance(first, PatternSpec) and isinstance(first.values, DenseSpec):
        return None
    return (
        f"it is stored as {scheme.describe()}, and zeros are moved among plain weights: prune with `magnitude` alone "
        "in front of it, and quantize the folder afterwards"
    )
