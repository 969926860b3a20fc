"""Products of 8-bit integers on a CPU: weights with a scale for each row, inputs with one for each token or for all.

y_to = s_t s_o (sum_j q_tj p_oj - z_t sum_j p_oj), the sum in 32-bit integers, by the kernels that torch has for its
quantized linears where the processor has instructions of its own for 8-bit products: the same as rounding the inputs
and multiplying floats, up to the order of float sums. Inputs go in as 8-bit codes with a scale of 1, so that one call
serves tokens of different scales.

Elsewhere float32 products of the codes take their place. They are whole numbers too: 1,024 products of 8-bit codes add
up to 2^24 at most, below which float32 holds every integer. A processor without instructions for bfloat16 multiplies
them several times as fast as that.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lilliput.formats.integer import IntegerFormat
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.parts.scheme import Scheme

_ENGINES = ("fbgemm", "x86")
_MIDDLE = 128  # of unsigned codes
_EXACT = 1 << 10  # products of two codes whose sum float32 holds
_PIECE = 1 << 20  # codes that are floats at a time
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
    """Whether codes are multiplied, which `in_floats` forbids."""
    return not _in_floats.get()


@functools.cache
def native() -> bool:
    """Whether torch has products of integers here whose sums are whole: without the processor's own instructions for
    them pairs are added in 16 bits, which the largest codes exceed."""
    if not any(x in torch.backends.quantized.supported_engines for x in _ENGINES):
        return False
    largest = torch.full((8, 64), 127, dtype=torch.int8)
    sums = Packed.of(largest).sums(largest[:1].float())
    return bool((sums == 127 * 127 * 64).all())


def forms(scheme: Scheme) -> tuple[IntegerFormat, UniformInput] | None:
    """The grids of weights and inputs that have integer products; None: others."""
    form, inputs = scheme.weights.integer, scheme.activation
    if form is None or not isinstance(inputs, UniformInput) or inputs.granularity not in ("token", "tensor"):
        return None
    held = form.bits == 8 and form.symmetric and form.group_size == -1 and inputs.bits == 8
    return (form, inputs) if held else None


class Kernel(Protocol):
    """Weights as a kernel reads them."""

    def sums(self, codes: Tensor) -> Tensor:
        """sum_j q_tj p_oj, float32 [tokens, out], of codes q float32 [tokens, in], which are rounded to the nearest
        whole number, halves to even, from -128 to 127."""
        ...


@dataclass(frozen=True)
class Packed:
    """By torch's quantized linears. What is NaN becomes some number."""

    packed: Any

    @staticmethod
    def of(codes: Tensor) -> Packed:
        """codes int8 [out, in]."""
        with warnings.catch_warnings():  # torch announces another home for these kernels
            warnings.simplefilter("ignore")
            engine = torch.backends.quantized.engine
            torch.backends.quantized.engine = next(
                x for x in _ENGINES if x in torch.backends.quantized.supported_engines
            )
            try:
                zeros = torch.zeros(len(codes), dtype=torch.int64)
                whole = torch._make_per_channel_quantized_tensor(codes, zeros + 1.0, zeros, 0)
                packed = torch.ops.quantized.linear_prepack(whole, None)
            finally:
                torch.backends.quantized.engine = engine
        return Packed(packed)

    def sums(self, codes: Tensor) -> Tensor:
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        found: Tensor = product(codes, 1.0, _MIDDLE, self.packed)
        return found


@dataclass(frozen=True)
class InFloats:
    """By float32 products of the codes int8 [out, in], a piece of them at a time as floats."""

    codes: Tensor

    def sums(self, codes: Tensor) -> Tensor:
        codes = codes.round().clamp_(-128, 127)
        rows, width = self.codes.shape
        out = codes.new_empty(len(codes), rows)
        across = min(width, _EXACT)
        down = max(1, min(rows, _PIECE // across))
        piece = codes.new_empty(down, across)
        for a in range(0, rows, down):
            b = min(a + down, rows)
            for j in range(0, width, across):
                k = min(j + across, width)
                some = piece[: b - a, : k - j].copy_(self.codes[a:b, j:k])
                if j:
                    out[:, a:b] += torch.nn.functional.linear(codes[:, j:k], some)
                else:
                    out[:, a:b] = torch.nn.functional.linear(codes[:, j:k], some)
        return out


@dataclass(frozen=True)
class Weights:
    """A kernel, with scale [out] of the rows, and the sums [out] of their values, float32."""

    kernel: Kernel
    scale: Tensor
    totals: Tensor

    @staticmethod
    def of(codes: Tensor, scale: Tensor) -> Weights:
        """codes int8 [out, in], scale [out]."""
        scale = scale.float()
        kernel: Kernel = Packed.of(codes) if native() else InFloats(codes)
        return Weights(kernel, scale, codes.to(torch.int32).sum(1).float() * scale)

    def times(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """float32 [tokens, out] of codes float32 [tokens, in] as of `Kernel`, with scales and zero points [tokens, 1]
        or [1]. NaN gives NaN."""
        sums = self.kernel.sums(codes).mul_(self.scale)
        if zero is not None:
            sums -= zero * self.totals
        sums = sums.mul_(scale)
        if scale.dim() < 2:  # a scale of their own would be NaN as well; a kernel may make a number of it
            sums.masked_fill_(codes.sum(1).isnan()[:, None], torch.nan)
        return sums
