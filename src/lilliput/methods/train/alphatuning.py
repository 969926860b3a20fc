"""AlphaTuning: of a binary coding the first alpha of each group is trained, and everything else stays.

    What = z + sum_i alpha_i b_i,    dL/dalpha_1 = sum g b_1 over the group,    b_i in {-1, +1} and alpha_2.. frozen.

The first alpha is the largest of its group: greedy coding finds it first. With `alphas` all, every alpha is trained.

Paper: Kwon et al. 2022, arXiv 2210.03858. Cost: no latent weights: the codes in a byte, and optimizer states for
alphas. Limits: binary coding, as bcq makes it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from lilliput.formats.binary import BinaryFormat
from lilliput.methods.train.peqa import Steps
from lilliput.parts.layer import Layer
from lilliput.parts.scheme import Scheme
from lilliput.training import coded
from lilliput.verbs.train import Train, TrainOptions
from lilliput.verbs.trained import Trained


class Options(TrainOptions):
    """See the module's docstring."""

    alphas: Literal["first", "all"] = Field("first", description="which alphas of a group are trained")


class Alphas(Steps):
    """Codes that stay, and shares by which some alphas move."""

    unit_alpha: Tensor

    def __init__(self, layer: Layer, o: Options) -> None:
        super().__init__(layer, ("alpha",))
        if o.alphas == "first":
            alpha = self.unit_alpha
            self.unit_alpha = alpha * one_hot(alpha.abs().argmax(-1), alpha.shape[-1])


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The alphas of the layer's last codes."""
    return Alphas(layer, o)


def admits(scheme: Scheme, o: Options) -> str | None:
    """Binary coding."""
    return coded.refused(scheme, (BinaryFormat,))


METHOD = Train(
    paper="Kwon et al. 2022, arXiv 2210.03858",
    options=Options,
    covers={
        "alphatuning": [{"method": "bcq", "target": {"format": "binary", "bits": 4}}, {"method": "alphatuning"}],
    },
    recipe=[{"method": "bcq", "target": {"format": "binary", "bits": 4}}, {"method": "alphatuning"}],
    begin=begin,
    admits=admits,
    copies=2,
)
