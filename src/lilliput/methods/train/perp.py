"""PERP: a pruned model is retrained by few parameters, and keeps its zeros.

Beside each pruned weight W stands a product of low rank under the mask of what is not 0,

    What = M * (W + (alpha / r) B A),   A [r, in], B [out, r],

which is added to W at the end: zeros stay, and nothing is left beside the weight. With `width` 0 the linears stay as
they are, and only what `others` names is trained: biases, norms, the head (`others: ["*bias", "*norm*"]`).

Paper: Zimmer et al. 2023, arXiv 2312.15230. Cost: the weight, and two thin factors with their gradients and moments;
the gradient by the weight passes through. Limits: plain linears.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from lilliput.methods.train import full
from lilliput.parts.layer import Layer
from lilliput.parts.scheme import Scheme
from lilliput.verbs.train import Train, TrainOptions
from lilliput.verbs.trained import Trained


class Options(TrainOptions):
    """See the module's docstring."""

    width: int = Field(8, ge=0, description="r, channels between the factors; 0: the linears stay as they are")
    alpha: float = Field(16.0, gt=0.0, description="strength of the product")


class Masked(Trained):
    """The weight [out, in] as it is, and a product under its mask."""

    value: Tensor

    def __init__(self, layer: Layer, o: Options) -> None:
        super().__init__()
        self.name = layer.name
        self.register_buffer("value", layer.decode().clone())
        rows, width = self.value.shape
        self._scale = o.alpha / max(o.width, 1)
        if o.width:
            generator = torch.Generator().manual_seed(o.seed)
            self.down = nn.Parameter(torch.randn(o.width, width, generator=generator) / width**0.5)
            self.up = nn.Parameter(torch.zeros(rows, o.width))
        self._adapted = bool(o.width)

    def weight(self) -> Tensor:
        if not self._adapted:
            return self.value
        return (self.value + self._scale * self.up @ self.down) * (self.value != 0)

    def finish(self) -> Layer:
        weight = self.weight().detach().clone()
        return Layer(self.name, weight)


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The weight as the steps before have left it."""
    return Masked(layer, o)


def admits(scheme: Scheme, o: Options) -> str | None:
    """Plain linears alone."""
    return full.admits(scheme, full.Options())


METHOD = Train(
    paper="Zimmer et al. 2023, arXiv 2312.15230",
    options=Options,
    covers={"perp": [{"method": "wanda", "target": {"sparsity": 0.5}}, {"method": "perp"}]},
    recipe=[{"method": "wanda", "target": {"sparsity": 0.5}}, {"method": "perp"}],
    begin=begin,
    admits=admits,
    copies=2,
)
