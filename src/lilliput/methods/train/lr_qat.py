"""LR-QAT: a low-rank product is trained inside the rounding, in units of codes, beside compactly stored weights.

    What = s (clip(round(Phi(W0 / s0 + Z) + (alpha / r) A B), lowest, highest) - Z)

with s0 the step before training, A [out, r] = 0 and B [r, in] at the start, gradients straight through round and clip,
and dL/ds = sum g (code - Z). Phi holds W0 / s0 in bfloat16 or in a byte (`hold`): fixed point with four bits behind the
point, from -8 to almost 8. A, B and s are trained. Weights are computed anew on the way back, so that none of them
stays in memory, and what is written are codes alone, without adapters.

Paper: Bondarenko et al. 2024, arXiv 2406.06385. Cost: one or two bytes a weight, and optimizer states for r (out + in)
numbers and the steps; each weight is computed twice. Limits: integers; zero points stay.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.formats import rounding
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.rounding import Units
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import Scheme
from lilliput.training import coded
from lilliput.training.coded import Coded, CodedOptions, Factors
from lilliput.verbs.train import Train
from lilliput.verbs.trained import Trained

_POINT = 16  # parts of a code, of a number with four bits behind the point


class Options(CodedOptions):
    """See the module's docstring."""

    inner: int = Field(32, ge=1, description="r: rank of the product")
    alpha: float | None = Field(None, gt=0.0, description="the product counts alpha / r times; none: once")
    hold: Literal["bfloat16", "q4.4"] = Field("bfloat16", description="how W0 / s0 is held meanwhile")
    scaled: bool = Field(False, description="gradients of steps times 1 / sqrt(N highest), as LSQ has them")


class Inside(Coded):
    """Phi [out, in], factors of a product, and shares by which the steps move."""

    recomputes: ClassVar[bool] = True
    held: Tensor

    def __init__(self, layer: Layer, original: Tensor, o: Options) -> None:
        super().__init__(layer, ("scale",), scaled=o.scaled)
        part = layer.parts[self.at]
        if not isinstance(part, QuantizedPart) or not isinstance(part.format, IntegerFormat):
            raise RuntimeError(f"{layer.name} has no integers, which admits() should have refused")
        self.integers, self.grid = part.format, part.grid
        self._units = Units(part.format, *layer.weight.shape)
        scale, zero = part.format.opened(part.grid)
        at = self.latent_start(original, o) * self._units.spread(scale.reciprocal()) + self._units.spread(zero)
        if o.start == "codes":
            at = part.codes.float()
        fixed = (at * _POINT).round().clamp(-128, 127).to(torch.int8) if o.hold == "q4.4" else at.to(torch.bfloat16)
        self.register_buffer("held", fixed)
        factor = 1.0 if o.alpha is None else o.alpha / o.inner
        self.factors = Factors(layer.name, *layer.weight.shape, rank=o.inner, scale=factor, seed=o.seed)

    def _present(self) -> tuple[Tensor, Tensor, Tensor]:
        """Position in code units less the zero points, and steps and zero points as a file holds them."""
        numbers = self.numbers()
        zero = numbers.get("zero", torch.zeros_like(numbers["scale"]))
        scale, zero = rounding.stored(numbers["scale"], zero, self._units, self.grid)
        held = self.held.float() / _POINT if self.held.dtype == torch.int8 else self.held.float()
        return self.supported(held + self.factors.product() - self._units.spread(zero)), scale, zero

    def value(self) -> Tensor:
        return rounding.rounded(*self._present(), self._units)

    def codes(self) -> tuple[Tensor, Any]:
        return rounding.encode(*self._present(), self._units, self.grid)


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The last codes of the layer."""
    return Inside(layer, original, o)


def admits(scheme: Scheme, o: Options) -> str | None:
    """Integers, of 4 bits at most where a byte holds them."""
    reason = coded.refused(scheme, (IntegerFormat,))
    if reason is not None:
        return reason
    form = coded.format_of(scheme)
    if o.hold == "q4.4" and isinstance(form, IntegerFormat) and form.bits > 4:
        return f"q4.4 holds codes from -8 to 7, and {form.describe()} has others: take hold bfloat16, or 4 bits"
    return coded.zeroless(scheme, o)


METHOD = Train(
    paper="Bondarenko et al. 2024, arXiv 2406.06385",
    options=Options,
    covers={
        "lr-qat": [
            {"method": "rtn", "target": {"bits": 4}},
            {"method": "lr-qat", "options": {"start": "original", "hold": "q4.4", "lr": 1e-3}},
        ],
    },
    recipe=[{"method": "rtn", "target": {"bits": 4}}, {"method": "lr-qat"}],
    begin=begin,
    admits=admits,
    restarts=coded.restarts,
    copies=2,
)
