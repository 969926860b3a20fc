"""replace: one line that says what my-method does. Now: one factor for each row of a plain linear is trained.

replace: the equations. What = diag(s) W, with s trained and W as it was.

Paper: replace: authors, year, arXiv number. Cost: replace: a number for each row, its gradient and two moments. Limits:
replace: plain linears.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lilliput.parts.layer import Layer
from lilliput.parts.scheme import Scheme
from lilliput.verbs.train import Train, TrainOptions
from lilliput.verbs.trained import Trained


class Options(TrainOptions):
    """replace: your options, each with a default and a description."""


class Scaled(Trained):
    """Factors float32 [out, 1] on the rows of a weight that stays."""

    kept: Tensor

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.name = layer.name
        self.register_buffer("kept", layer.decode())
        self.factor = nn.Parameter(torch.ones(len(layer.weight), 1))

    def weight(self) -> Tensor:
        # replace: your equations
        return self.factor * self.kept

    def finish(self) -> Layer:
        return Layer(self.name, self.weight().detach().clone())


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The weight as the steps before have left it."""
    return Scaled(layer)


def admits(scheme: Scheme, o: Options) -> str | None:
    """Plain linears alone."""
    if scheme.parts or scheme.inputs or scheme.outputs:
        return f"it is stored as {scheme.describe()}, and this step trains plain linears"
    return None


METHOD = Train(
    paper="replace: authors, year, arXiv number",
    options=Options,
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    begin=begin,
    admits=admits,
)
