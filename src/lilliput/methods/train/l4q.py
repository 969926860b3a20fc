"""L4Q: a low-rank product is added to the weight before it is rounded, with the steps of the grid learned as by LSQ.

    What = Q(W0 + (alpha / r) B A; S, Z),    W0 frozen, B [out, r] = 0 and A [r, in] at the start,

with LSQ's gradients for S and Z, and those of B and A straight through the rounding: the latent weight's gradient g p
gives dL/dB = (alpha / r) (g p) AT and dL/dA = (alpha / r) BT (g p). What is written are codes alone, without adapters.

Paper: Jeon et al. 2024, arXiv 2402.04902. Cost: W0 in float32, and optimizer states for r (out + in) numbers and steps.
Limits: as for lsq; the weight can move by a product of rank r alone.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from lilliput.formats.ggml import GgmlFormat
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.levels import LevelFormat
from lilliput.formats.ternary import TernaryFormat
from lilliput.parts.layer import Layer
from lilliput.parts.scheme import Scheme
from lilliput.training import coded, grids
from lilliput.training.coded import Coded, CodedOptions, Factors
from lilliput.verbs.train import Train
from lilliput.verbs.trained import Trained

FORMATS = (IntegerFormat, GgmlFormat, LevelFormat, TernaryFormat)


class Options(CodedOptions):
    """See the module's docstring."""

    inner: int = Field(4, ge=1, description="r: rank of the product")
    alpha: float | None = Field(None, gt=0.0, description="the product counts alpha / r times; none: once")
    zeros: bool = Field(True, description="learn zero points too, where there are any")
    scaled: bool = Field(True, description="gradients of steps times 1 / sqrt(N highest)")


class Adapted(Coded):
    """W0 float32 [out, in], factors of a product, and shares by which the numbers of the grid move."""

    latent: Tensor

    def __init__(self, layer: Layer, original: Tensor, o: Options) -> None:
        super().__init__(layer, ("scale", "zero") if o.zeros else ("scale",), scaled=o.scaled)
        self.register_buffer("latent", self.latent_start(original, o))
        factor = 1.0 if o.alpha is None else o.alpha / o.inner
        self.factors = Factors(layer.name, *layer.weight.shape, rank=o.inner, scale=factor, seed=o.seed)

    def _moved(self) -> Tensor:
        return self.supported(self.latent + self.factors.product())

    def value(self) -> Tensor:
        return grids.meant(self.tuned, self.numbers(), latent=self._moved())

    def codes(self) -> tuple[Tensor, Any]:
        grid = self.tuned.closed(self.numbers())
        return self.form.encode(self._moved(), grid), grid


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The last codes of the layer."""
    return Adapted(layer, original, o)


def admits(scheme: Scheme, o: Options) -> str | None:
    """Codes of a grid with steps."""
    reason = coded.refused(scheme, FORMATS)
    return reason if reason is not None else coded.zeroless(scheme, o)


METHOD = Train(
    paper="Jeon et al. 2024, arXiv 2402.04902",
    options=Options,
    covers={
        "l4q": [
            {"method": "rtn", "target": {"bits": 4, "group_size": 64, "symmetric": False}},
            {"method": "l4q", "options": {"start": "original"}},
        ],
    },
    recipe=[{"method": "rtn", "target": {"bits": 4, "symmetric": False}}, {"method": "l4q"}],
    begin=begin,
    admits=admits,
    restarts=coded.restarts,
    copies=4,
)
