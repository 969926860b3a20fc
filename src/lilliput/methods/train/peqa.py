"""PEQA: the steps of a grid are trained for a task, and the codes stay as they are.

    What = (s0 + ds) * (q - Z),    q and Z frozen,    dL/ds = sum g (q - Z) over the unit that shares s

so that a task is a set of steps, some ten thousandths of the weights, and switching tasks exchanges them.

Paper: Kim et al. 2023, arXiv 2305.14152. Cost: no latent weights: the codes in a byte, and optimizer states for steps
alone. Limits: codes on grids with steps (integers, ggml's types, levels, ternary codes); types with super-blocks move
the integers on their steps.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lilliput.formats.ggml import GgmlFormat
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.levels import LevelFormat
from lilliput.formats.ternary import TernaryFormat
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import Scheme
from lilliput.training import coded, grids
from lilliput.training.coded import Coded
from lilliput.verbs.train import Train, TrainOptions
from lilliput.verbs.trained import Trained

FORMATS = (IntegerFormat, GgmlFormat, LevelFormat, TernaryFormat)


class Options(TrainOptions):
    """See the module's docstring."""

    scaled: bool = Field(False, description="gradients of steps times 1 / sqrt(N highest), as LSQ has them")


class Steps(Coded):
    """Codes that stay, and shares by which the numbers `moving` of their grid move."""

    held: Tensor

    def __init__(self, layer: Layer, moving: tuple[str, ...], *, scaled: bool = False) -> None:
        super().__init__(layer, moving, scaled=scaled)
        part = layer.parts[self.at]
        if not isinstance(part, QuantizedPart):
            raise RuntimeError(f"{layer.name} has no codes, which admits() should have refused")
        self.register_buffer("held", part.codes.clone())

    def value(self) -> Tensor:
        return grids.meant(self.tuned, self.numbers(), codes=self.held)

    def codes(self) -> tuple[Tensor, Any]:
        with torch.no_grad():
            return self.held.clone(), self.tuned.closed(self.numbers())


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The steps of the layer's last codes."""
    return Steps(layer, ("scale",), scaled=o.scaled)


def admits(scheme: Scheme, o: Options) -> str | None:
    """Codes of a grid with steps."""
    return coded.refused(scheme, FORMATS)


METHOD = Train(
    paper="Kim et al. 2023, arXiv 2305.14152",
    options=Options,
    covers={
        "peqa": [{"method": "rtn", "target": {"bits": 4}}, {"method": "peqa"}],
    },
    recipe=[{"method": "rtn", "target": {"bits": 4}}, {"method": "peqa"}],
    begin=begin,
    admits=admits,
    copies=2,
)
