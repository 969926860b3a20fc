"""Products of 8-bit integers on a CPU: weights with a scale for each row, inputs with one for each token or for all.

y_to = s_t s_o (sum_j q_tj p_oj - z_t sum_j p_oj), the sum in 32-bit integers, by the kernels that torch has for its
quantized linears (extra instructions for 8-bit products where the processor has them): the same as rounding the inputs
and multiplying floats, up to the order of float sums. Inputs go in as 8-bit codes with a scale of 1, so that one call
serves tokens of different scales.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.formats.integer import IntegerFormat
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.parts.scheme import Scheme

_ENGINES = ("fbgemm", "x86")
_MIDDLE = 128  # of unsigned codes
_in_floats = ContextVar("integers are multiplied as floats", default=False)


@contextmanager
def in_floats() -> Iterator[None]:
    """Linears round their inputs and multiply floats while the context lasts, in the order of sums of any other linear:
    a sum in another order moves an input across the edge between two codes, a whole step away."""
    token = _in_floats.set(True)
    try:
        yield
    finally:
        _in_floats.reset(token)


def available() -> bool:
    """Whether integers are multiplied: torch has such products on this machine, and `in_floats` does not forbid it."""
    return not _in_floats.get() and _exact()


@functools.cache
def _exact() -> bool:
    """Whether sums of products are whole: without the processor's own instructions for them pairs are added in 16 bits,
    which the largest codes exceed."""
    if not any(x in torch.backends.quantized.supported_engines for x in _ENGINES):
        return False
    largest = torch.full((8, 64), 127, dtype=torch.int8)
    sums = Weights.of(largest, torch.ones(8)).times(largest[:1].float(), torch.ones(1), None)
    return bool((sums == 127 * 127 * 64).all())


def forms(scheme: Scheme) -> tuple[IntegerFormat, UniformInput] | None:
    """The grids of weights and inputs that have integer products; None: others."""
    form, inputs = scheme.weights.integer, scheme.activation
    if form is None or not isinstance(inputs, UniformInput) or inputs.granularity not in ("token", "tensor"):
        return None
    held = form.bits == 8 and form.symmetric and form.group_size == -1 and inputs.bits == 8
    return (form, inputs) if held else None


@dataclass(frozen=True)
class Weights:
    """Weights as the kernel reads them: `packed`, with scales in float32; `sums` [out]: of a row's values."""

    packed: Any
    sums: Tensor

    @staticmethod
    def of(codes: Tensor, scale: Tensor) -> Weights:
        """codes int8 [out, in], scale [out]."""
        with warnings.catch_warnings():  # torch announces another home for these kernels
            warnings.simplefilter("ignore")
            engine = torch.backends.quantized.engine
            torch.backends.quantized.engine = next(
                x for x in _ENGINES if x in torch.backends.quantized.supported_engines
            )
            try:
                zeros = torch.zeros(len(codes), dtype=torch.int64)
                whole = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
                packed = torch.ops.quantized.linear_prepack(whole, None)
            finally:
                torch.backends.quantized.engine = engine
        return Weights(packed, codes.to(torch.int32).sum(1).float() * scale.float())

    def times(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """float32 [tokens, out] of codes float32 [tokens, in], with scales and zero points [tokens, 1] or [1]; the
        kernel rounds codes to the nearest whole number, halves to even, from -128 to 127. NaN gives NaN."""
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        sums: Tensor = product(codes, 1.0, _MIDDLE, self.packed)
        if zero is not None:
            sums -= zero * self.sums
        sums = sums.mul_(scale)
        if scale.dim() < 2:  # a scale of their own would be NaN as well; the kernel makes a number of it
            sums.masked_fill_(codes.sum(1).isnan()[:, None], torch.nan)
        return sums
