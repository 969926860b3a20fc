"""The nonlinear functions of a transformer on integers alone, as I-BERT has them (Kim et al. 2021, arXiv 2101.01321).

A tensor is integers q with a scale S, x = S q. Polynomials of second degree stand for functions, and completing the
square leaves one integer product: a (x + b)^2 + c = a S^2 [(q + floor(b / S))^2 + floor(c / (a S^2))]. Scales are plain
numbers, known before the integers are: nothing but integers depends on the data.

    exp(x), x <= 0:   x = -z ln 2 + p with p in (-ln 2, 0]; 0.3585 (p + 1.353)^2 + 0.344, shifted right by z
    erf(x):           sgn(x) [a (min(|x|, -b) + b)^2 + 1], a = -0.2888, b = -1.769
    GELU(x):          x (1 + erf(x / sqrt 2)) / 2
    floor(sqrt(n)):   Newton's steps x <- floor((x + floor(n / x)) / 2) until they stop falling
    softmax, norms:   from these, and one integer division

exp, softmax and norms differ from floating point by less than 0.01, GELU by less than 0.02 (0.01 root mean square). The
polynomial of erf has 0.096 beside 0 in place of 0, which GELU multiplies with x.

Integers are int64 here, where a chip takes 32 bits: with the scales of 8 or 16 bits nothing comes near that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LN2 = math.log(2.0)
_EXP = (0.3585, 1.353, 0.344)
_ERF = (-0.2888, -1.769, 1.0)
_FAR = 62  # a shift by more leaves nothing


@dataclass(frozen=True)
class Scaled:
    """x = `scale` * `codes`, codes int64 of any shape."""

    codes: Tensor
    scale: float

    def value(self) -> Tensor:
        """In float32."""
        return (self.codes.double() * self.scale).float()


def scaled(x: Tensor, scale: float) -> Scaled:
    """The nearest codes of x."""
    return Scaled((x.double() / scale).round().to(torch.int64), scale)


def polynomial(x: Scaled, a: float, b: float, c: float) -> Scaled:
    """a (x + b)^2 + c."""
    scale = a * x.scale * x.scale
    return Scaled((x.codes + math.floor(b / x.scale)).square() + math.floor(c / scale), scale)


def exp(x: Scaled) -> Scaled:
    """e^x for x <= 0. Raises ValueError where the scale is too coarse to tell ln 2 from 0."""
    step = math.floor(_LN2 / x.scale)
    if step < 1:
        raise ValueError(f"a scale of {x.scale} has no code for ln 2: take one below {_LN2:.3f}")
    z = (-x.codes) // step
    small = polynomial(Scaled(x.codes + z * step, x.scale), *_EXP)
    return Scaled(small.codes >> z.clamp(max=_FAR), small.scale)


def erf(x: Scaled) -> Scaled:
    """The error function."""
    a, b, c = _ERF
    size = x.codes.abs().clamp(max=math.floor(-b / x.scale))
    found = polynomial(Scaled(size, x.scale), a, b, c)
    return Scaled(x.codes.sign() * -found.codes, -found.scale)  # a is negative, and scales are positive


def gelu(x: Scaled) -> Scaled:
    """x times the share of a standard normal distribution below it."""
    inner = erf(Scaled(x.codes, x.scale / math.sqrt(2.0)))
    one = math.floor(1.0 / inner.scale)
    return Scaled(x.codes * (inner.codes + one), x.scale * inner.scale / 2)


def sqrt(n: Tensor) -> Tensor:
    """floor(sqrt(n)) of n >= 0, int64 of any shape."""
    bits = int(n.max()).bit_length() if n.numel() else 0
    x = torch.full_like(n, 1 << ((bits + 1) // 2))
    while True:
        following = (x + n // x.clamp(min=1)) // 2
        following = torch.minimum(following, x)
        if torch.equal(following, x):
            return torch.where(n > 0, x, 0)
        x = following


def softmax(x: Scaled, bits: int = 16) -> Scaled:
    """Over the last axis, in steps of 2^-bits."""
    found = exp(Scaled(x.codes - x.codes.amax(-1, keepdim=True), x.scale))
    return Scaled((found.codes << bits) // found.codes.sum(-1, keepdim=True).clamp(min=1), 2.0**-bits)


def layer_norm(x: Scaled, bits: int = 16) -> Scaled:
    """(x - mean) / deviation over the last axis, without gain and bias, in steps of 2^-bits."""
    return _normed(x.codes - _mean(x.codes.sum(-1, keepdim=True), x.codes.shape[-1]), bits)


def rms_norm(x: Scaled, bits: int = 16) -> Scaled:
    """x over its root mean square over the last axis, without gain, in steps of 2^-bits."""
    return _normed(x.codes, bits)


def _normed(codes: Tensor, bits: int) -> Scaled:
    deviation = sqrt(_mean(codes.square().sum(-1, keepdim=True), codes.shape[-1]))
    return Scaled((codes << bits) // deviation.clamp(min=1), 2.0**-bits)


def _mean(total: Tensor, count: int) -> Tensor:
    """To the nearest integer."""
    return (2 * total + count) // (2 * count)
