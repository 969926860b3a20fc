"""OneBit: signs and their two value vectors are trained, from the decomposition that svid makes.

    What = sign(W) * (a bT),    dL/dW = g * (a bT) * (1.001 - tanh(W)^2),    dL/da_i = sum_j g b_j sign_ij,
    dL/db_j = sum_i g a_i sign_ij,    sign(0) = 1.

Paper: Xu et al. 2024, arXiv 2402.11295. Cost: a latent weight, its gradient and two moments in float32. Limits: the
paper's layer ends with a norm of its outputs, which would be a new architecture that no engine loads: it is left out
here, and so is its use of tens of billions of tokens; unusable after short trainings of small models.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lilliput.formats.sign import SignFormat
from lilliput.parts.layer import Layer
from lilliput.parts.scheme import Scheme
from lilliput.training import coded, grids
from lilliput.training.coded import Coded, CodedOptions
from lilliput.verbs.train import Train
from lilliput.verbs.trained import Trained


class Options(CodedOptions):
    """See the module's docstring."""


class Signed(Coded):
    """Latent weights float32 [out, in] whose signs count, and shares by which both vectors move."""

    def __init__(self, layer: Layer, original: Tensor, o: Options) -> None:
        super().__init__(layer, ("left", "right"))
        self.latent = nn.Parameter(self.latent_start(original, o))

    def value(self) -> Tensor:
        return grids.meant(self.tuned, self.numbers(), latent=self.latent)

    def codes(self) -> tuple[Tensor, Any]:
        grid = self.tuned.closed(self.numbers())
        return self.form.encode(self.latent, grid), grid


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The layer's last signs."""
    return Signed(layer, original, o)


def admits(scheme: Scheme, o: Options) -> str | None:
    """Signs with two vectors."""
    reason = coded.refused(scheme, (SignFormat,))
    return reason if reason is not None else coded.zeroless(scheme, o)


METHOD = Train(
    paper="Xu et al. 2024, arXiv 2402.11295",
    options=Options,
    covers={
        "onebit": [
            {"method": "svid", "target": {"format": "sign"}},
            {"method": "onebit", "options": {"start": "original", "lr": 4e-4}},
        ],
    },
    recipe=[{"method": "svid", "target": {"format": "sign"}}, {"method": "onebit"}],
    begin=begin,
    admits=admits,
    restarts=coded.restarts,
)
