"""Full weights: every weight of a linear is trained as it is; what was pruned stays 0.

It trains plain linears: those of a model that lost channels, blocks or weights, or none. The gradient of a weight that
is exactly 0 is left out, so that a mask survives without being known.

Paper: magnitude masks kept while training, after Han et al. 2015, arXiv 1506.02626. Cost: a weight, its gradient and
two moments in float32. Limits: linears that are codes are trained by `lsq`.
"""

from __future__ import annotations

from torch import Tensor, nn

from lilliput.parts.layer import Layer
from lilliput.parts.scheme import Scheme
from lilliput.verbs.train import Train, TrainOptions
from lilliput.verbs.trained import Trained


class Options(TrainOptions):
    """See the module's docstring."""


class Full(Trained):
    """The weight itself, float32 [out, in]; support: where it may differ from 0, None: everywhere."""

    support: Tensor | None

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        value = layer.decode()
        self.name = layer.name
        self.value = nn.Parameter(value.clone())
        zeros = value == 0
        self.register_buffer("support", ~zeros if bool(zeros.any()) else None)

    def weight(self) -> Tensor:
        return self.value if self.support is None else self.value * self.support

    def finish(self) -> Layer:
        return Layer(self.name, self.weight().detach().clone())


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The weight as the steps before have left it."""
    return Full(layer)


def admits(scheme: Scheme, o: Options) -> str | None:
    """Plain linears alone."""
    if scheme.parts or scheme.inputs or scheme.outputs:
        return f"it is stored as {scheme.describe()}, and full weights are trained of plain linears: train it with lsq"
    return None


METHOD = Train(
    paper="Han et al. 2015, arXiv 1506.02626",
    options=Options,
    covers={
        "sparse-finetuning": [
            {"method": "sparsegpt", "target": {"sparsity": 0.5}},
            {
                "method": "full",
                "options": {"objective": "feature-kd", "objective_options": {"soft": 0.5, "scale": "layer"}},
            },
        ],
        "joint-prune-kd": [
            {"method": "group-magnitude", "options": {"kinds": ["channel", "head"]}},
            {"method": "full", "options": {"objective": "logit-kd"}},
        ],
    },
    recipe=[{"method": "full"}],
    begin=begin,
    admits=admits,
)
