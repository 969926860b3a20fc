"""Ranges of integer grids: which scale and zero point a unit of weights gets.

Everything works on "centred" codes c = code - zero, so that value = c * scale and the zero point only moves the window
of codes that exist: [lowest - zero, highest - zero]. A negative scale mirrors the window of a symmetric grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lilliput.errors import LilliputError

_STRIDE = 3


def relative(weight: Tensor, importance: Tensor | None) -> Tensor | None:
    """The importance of inputs of `weight` [out, in], given as [in] or [out, in], as a share of the largest: [1 or out,
    in].

    Raises LilliputError for NaN or infinity, ValueError for another shape.
    """
    if importance is None:
        return None
    rows, width = weight.shape
    importance = importance.to(weight)
    if importance.shape not in ((width,), (rows, width)):
        raise ValueError(f"importance {tuple(importance.shape)} does not fit a weight {tuple(weight.shape)}")
    if not bool(torch.isfinite(importance.sum())):
        raise LilliputError("the importance of the inputs contains NaN or infinity: check the calibration data")
    top = importance.max() if importance.numel() else importance.new_tensor(0.0)
    # Relative to the largest, so that equal importance is exactly none; if nothing counts, all count alike.
    importance = importance / top if bool(top > 0) else torch.ones_like(importance)
    return importance.expand(1 if importance.dim() == 1 else rows, width)


def check(weight: Tensor, scale: Tensor, kind: str) -> None:
    """Raises LilliputError where a scale is not finite: the weight is not, or the scale exceeds its kind."""
    if bool(torch.isfinite(scale).all()):
        return
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise LilliputError(f"the weight contains {bad} values that are NaN or infinite: it cannot be quantized")
    raise LilliputError(f"a scale exceeds the range of {kind}: set scale_dtype to float32 (or bfloat16) for this layer")


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as a file holds it, in float32: rounded to `dtype`, 0 replaced by 1, too small raised to the smallest."""
    tiny = 2.0**-24 if dtype is torch.float16 else torch.finfo(dtype).smallest_normal
    size = scale.abs()
    size_stored = torch.where(size == 0, 1.0, size.clamp(min=tiny)).to(dtype).float()
    return torch.where(scale < 0, -size_stored, size_stored)


@dataclass(frozen=True)
class Rule:
    """How to choose: see `IntegerFormat.fit`."""

    bits: int
    symmetric: bool
    dtype: torch.dtype
    search: Literal["minmax", "mse"]
    steps: int
    norm: float
    signed: bool
    polish: bool = True

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def shortest(self) -> float:
        """The smallest share of the range that the search tries: fewer bits clip more."""
        return min(0.9, 0.1 + 0.1 * self.bits)

    def window(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor] | None:
        """Smallest and largest centred code of each unit; None where all have [lowest, highest]."""
        if not self.symmetric:
            return self.lowest - zero, self.highest - zero
        if not self.signed:
            return None
        low = torch.where(scale < 0, float(-self.highest), float(self.lowest))
        return low, low + (self.highest - self.lowest)


def fit(w: Tensor, importance: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """Scale (as stored) and zero, both float32 [rows, groups], for units w [rows, groups, size].

    `importance` broadcasts to w. NaN or infinity in w gives scales that are not finite.
    """
    low, high = w.amin(-1, keepdim=True).clamp_(max=0.0), w.amax(-1, keepdim=True).clamp_(min=0.0)
    scale, zero = _cover(low, high, rule)
    if rule.search == "minmax":
        return scale.squeeze(-1), zero.squeeze(-1)
    work = _Work(w, importance, rule)
    best = _Best(scale, zero, work.error(scale, zero))
    wide, at = scale, torch.zeros_like(scale)
    unit = (1.0 - rule.shortest) / max(rule.steps - 1, 1)
    # The error is smooth enough in the factor: every third one, then the neighbours of the best. It loses 0.1 % of the
    # error of trying them all, in half the time.
    for i in range(_STRIDE, rule.steps, _STRIDE):
        trial = stored(wide * (1.0 - unit * i), rule.dtype)
        error = work.error(trial, zero)
        at = torch.where(error < best.error, float(i), at)
        best.take(trial, zero, error)
    for move in (-1.0, 1.0):
        trial = stored(wide * (1.0 - unit * (at + move).clamp_(0.0, rule.steps - 1.0)), rule.dtype)
        best.take(trial, zero, work.error(trial, zero))
    for _ in range(2 if rule.polish else 0):
        trial = work.refit(best.scale, best.zero)
        best.take(trial, best.zero, work.error(trial, best.zero))
        for neighbour in work.neighbours(best.scale, best.zero):
            trial = work.refit(*neighbour)
            best.take(trial, neighbour[1], work.error(trial, neighbour[1]))
    return best.scale.squeeze(-1), best.zero.squeeze(-1)


def _cover(low: Tensor, high: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Min-max scale (as stored) and zero for ranges [low, high] that contain 0."""
    if not rule.symmetric:
        scale = stored((high - low) / (rule.highest - rule.lowest), rule.dtype)
        zero = (rule.lowest - torch.round(low / scale)).clamp_(rule.lowest, rule.highest)
        return scale, zero
    scale = torch.maximum(high, -low) / rule.highest
    if rule.signed:  # the extra code belongs to the negative side of the window: mirror it where the top is longer
        scale = torch.where(high > -low, -scale, scale)
    return stored(scale, rule.dtype), torch.zeros_like(scale)


@dataclass
class _Best:
    scale: Tensor
    zero: Tensor
    error: Tensor

    def take(self, scale: Tensor, zero: Tensor, error: Tensor) -> None:
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)


class _Work:
    """Two buffers of the size of w, reused by every trial so that they stay in cache."""

    def __init__(self, w: Tensor, importance: Tensor | None, rule: Rule) -> None:
        self.w, self.importance, self.rule = w, importance, rule
        self.exact, self.code = torch.empty_like(w), torch.empty_like(w)

    def _round(self, scale: Tensor, zero: Tensor) -> None:
        torch.mul(self.w, scale.abs().reciprocal(), out=self.exact)
        torch.round(self.exact, out=self.code)
        window = self.rule.window(scale, zero)
        if window is None:
            self.code.clamp_(self.rule.lowest, self.rule.highest)
        else:  # two passes: torch clamps by tensors ten times slower
            torch.maximum(self.code, window[0], out=self.code)
            torch.minimum(self.code, window[1], out=self.code)

    def error(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Sum of importance * |error|^norm, [rows, groups, 1]."""
        self._round(scale, zero)
        miss = self.code.sub_(self.exact)
        if self.rule.norm == 2.0:
            miss.mul_(miss)
        else:
            miss.abs_().pow_(self.rule.norm)
        if self.importance is not None:
            miss.mul_(self.importance)
        return miss.sum(-1, keepdim=True).mul_(scale.abs().pow(self.rule.norm))

    def refit(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The least-squares scale (as stored) of the codes that (scale, zero) gives."""
        self._round(scale, zero)
        self.exact.mul_(self.code)
        self.code.mul_(self.code)
        if self.importance is not None:
            self.exact.mul_(self.importance)
            self.code.mul_(self.importance)
        top, bottom = self.exact.sum(-1, keepdim=True), self.code.sum(-1, keepdim=True)
        factor = torch.where((bottom > 0) & (top > 0), top / bottom, 1.0)
        return stored(scale * factor, self.rule.dtype)

    def neighbours(self, scale: Tensor, zero: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The same step with the window of codes moved by one."""
        if not self.rule.symmetric:
            limits = (self.rule.lowest, self.rule.highest)
            return [(scale, (zero + move).clamp_(*limits)) for move in (-1, 1)]
        return [(-scale, zero)] if self.rule.signed else []
