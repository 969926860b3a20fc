"""LSQ: weights under straight-through rounding, with the steps of their grid learned too.

A weight w with the step S of its group is what its code says, and gradients pass the rounding as if it were not there:

    What = S (clip(round(w / S) + Z, lowest, highest) - Z)
    dL/dw = g inside the window of codes, 0 outside
    dL/dS = sum g (code - Z - w / S) inside, sum g (clip - Z) outside,

times 1 / sqrt(N highest) for N weights of a step (`scaled`). Z stays, or moves with `zeros`. With `steps_learned` off
the steps stay as they are (STE). Latent weights begin at the original's, or at what the codes say (`start`): the former
keeps what rounding has thrown away, the latter keeps what GPTQ has compensated.

Papers: Esser et al. 2020, arXiv 1902.08153; Bengio et al. 2013, arXiv 1308.3432. Cost: a latent weight, its gradient
and two moments in float32. Limits: integers, ggml's types and tables of levels at the end of a linear's parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lilliput.formats import rounding
from lilliput.formats.ggml import GgmlFormat
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.rounding import Units
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.parts.transform import turn, turn_back
from lilliput.verbs.train import Train, TrainOptions
from lilliput.verbs.trained import Trained


class Options(TrainOptions):
    """See the module's docstring."""

    learn_steps: bool = Field(True, description="learn the steps of the grid; false: STE on the weights alone")
    scaled: bool = Field(True, description="gradients of steps times 1 / sqrt(N highest)")
    start: Literal["codes", "original"] = Field("codes", description="where latent weights begin")


class Rounded(Trained):
    """Latent weights float32 [out, in] of the last part of a layer, and factors [units] on its steps."""

    scale: Tensor
    zero: Tensor

    def __init__(self, layer: Layer, original: Tensor, o: Options) -> None:
        super().__init__()
        part = layer.parts[-1]
        if not isinstance(part, QuantizedPart) or not isinstance(part.format, IntegerFormat | GgmlFormat):
            raise RuntimeError(f"{layer.name} ends with {part.spec.describe()}, which admits() should have refused")
        self._before = replace(layer, parts=layer.parts[:-1])
        self._form, self._grid = part.format, part.grid
        self._units = Units(part.format, *layer.weight.shape)
        scale, zero = part.format.opened(part.grid)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        held = part.decode()
        if o.start == "original":
            rest = replace(self._before, weight=original, support=None, updated=None).rest()
            latent = rest if layer.support is None else torch.where(layer.support, rest, 0.0)
        else:
            latent = held.clone()
        self.latent = nn.Parameter(latent)
        self.factor = nn.Parameter(torch.ones_like(scale)) if o.learn_steps else None
        size = float(latent.square().mean().sqrt())
        self._rate = 1.0 / max(size, 1e-12)
        count = latent.numel() / max(scale.numel(), 1)
        self._damp = 1 / math.sqrt(count * max(part.format.highest, 1)) if o.scaled else 1.0

    def rates(self) -> Mapping[str, float]:
        # A step moves by the share of itself by which an average weight moves.
        return {"factor": self._rate}

    def _steps(self) -> tuple[Tensor, Tensor]:
        if self.factor is None:
            return self.scale, self.zero
        damped = self._damp * self.factor + (1 - self._damp) * self.factor.detach()
        return rounding.stored(self.scale * damped, self.zero, self._units, self._grid)

    def _base(self) -> Tensor | None:
        if not self._before.parts:
            return None
        return turn(self._before.weight, self._before.inputs, self._before.outputs) - self._before.rest()

    def weight(self) -> Tensor:
        scale, zero = self._steps()
        position = self.latent * self._units.spread(scale.reciprocal())
        value = rounding.rounded(position, scale, zero, self._units)
        base = self._base()
        value = value if base is None else value + base
        return turn_back(value, self._before.inputs, self._before.outputs)

    def finish(self) -> Layer:
        with torch.no_grad():
            scale, zero = self._steps()
            position = self.latent * self._units.spread(scale.reciprocal())
            codes, grid = rounding.encode(position, scale, zero, self._units, self._grid)
        return replace(self._before, parts=(*self._before.parts, QuantizedPart(self._form, codes, grid)))


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The last part of the layer, which is codes."""
    return Rounded(layer, original, o)


def admits(scheme: Scheme, o: Any) -> str | None:
    """Codes of integers or of ggml's types as the last part."""
    last = scheme.parts[-1] if scheme.parts else None
    if isinstance(last, QuantizedSpec) and isinstance(last.format, IntegerFormat | GgmlFormat):
        return None
    what = "a plain linear" if last is None else f"stored as {scheme.describe()}"
    return f"it is {what}, and rounding is trained of codes of integers or ggml's types: quantize it first, with rtn"


METHOD = Train(
    paper="Esser et al. 2020, arXiv 1902.08153; Bengio et al. 2013, arXiv 1308.3432",
    options=Options,
    covers={
        "ste": [
            {"method": "rtn", "target": {"bits": 4}},
            {"method": "lsq", "options": {"learn_steps": False, "start": "original"}},
        ],
    },
    recipe=[{"method": "rtn", "target": {"bits": 4}}, {"method": "lsq"}],
    begin=begin,
    admits=admits,
)
