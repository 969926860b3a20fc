"""Scales for ggml's blocks, looked for under an importance-weighted error.

A group of weights is w ~ s q + o with codes q. For given codes the error is a quadratic of s and o whose five sums
A = sum h q^2, B = sum h q, C = sum h, D = sum h w q, E = sum h w say everything, so that

1. a group by itself: ranges are tried, each followed by the least-squares s and o of its codes, and the best goes on
   with rounds of codes and least squares;
2. a super-block: steps d that the groups' scales are multiples of are tried on that quadratic, which costs a pass over
   groups and none over weights; the offsets, which can make up for rounded scales, are chosen after the scales;
3. both together: new codes, then for each group the neighbouring scale with its best offset, then the least-squares
   steps of the block. The state stays where the true error is smallest.

llama.cpp does 1, from one end of the range, and rounds to the largest scale's step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.formats import tables
from lilliput.formats.ggml_bytes import Kind

_TINY = 2.0**-24  # the smallest float16
_LONGEST = 1.2  # range tried, of one that covers: weights may fall on levels by luck
_STEPS = 24  # steps of a super-block that are tried
_ROUNDS = 4  # of codes and scales together


@dataclass(frozen=True)
class Scales:
    """Scales of blocks w [rows, blocks, groups, size], float32: d, m [rows, blocks, 1] as float16 holds them, and
    integer codes [rows, blocks, groups] (1 where a type has none); s = d * c, o = m * e."""

    d: Tensor
    c: Tensor
    m: Tensor
    e: Tensor

    @property
    def scale(self) -> Tensor:
        return self.d * self.c

    @property
    def offset(self) -> Tensor:
        return self.m * self.e


@dataclass(frozen=True)
class _Sums:
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    e: Tensor

    def error(self, s: Tensor, o: Tensor) -> Tensor:
        """The error of scales and offsets less sum h w^2, for the codes at hand."""
        return s * (self.a * s + 2 * (self.b * o - self.d)) + o * (self.c * o - 2 * self.e)


def rounder(kind: Kind, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """What replaces (w - o) / s in place by the values of the nearest codes."""
    if not kind.table:
        return lambda x: x.round_().clamp_(kind.lowest, kind.highest)
    table = tables.of("custom", 4, tuple(float(x) for x in kind.table), str(device))

    def snap(x: Tensor) -> Tensor:
        table.snap(x)
        return x

    return snap


class Search:
    """Scales for w [rows, blocks, groups, size] of one type; h [1 or rows, blocks, groups, size] weighs errors."""

    def __init__(self, kind: Kind, w: Tensor, h: Tensor | None, steps: int) -> None:
        self._kind, self._w, self._h, self._steps = kind, w, h, steps
        self._snap = rounder(kind, w.device)
        self._hw = w if h is None else w * h
        plain = torch.full(w.shape[:-1], float(w.shape[-1]), device=w.device)
        self._c = plain if h is None else h.sum(-1).expand(w.shape[:-1])
        self._e = self._hw.sum(-1)
        self._levels = kind.table or range(kind.lowest, kind.highest + 1)
        self._low, self._high = float(self._levels[0]), float(self._levels[-1])

    def cover(self) -> Scales:
        """Every weight of a group within its range, as far as its scale is exact."""
        return self._shared(*self._covering())

    def best(self) -> Scales:
        """The scales of least error that the search sees."""
        scales = self._shared(*self._alone())
        best, least = scales, self._error(scales)
        for _ in range(_ROUNDS):
            scales = self._together(scales)
            error = self._error(scales)
            better = error < least
            best = Scales(
                *(torch.where(better, x, y) for x, y in zip(vars(scales).values(), vars(best).values(), strict=True))
            )
            least = torch.where(better, error, least)
        return best

    def _codes(self, s: Tensor, o: Tensor | None) -> Tensor:
        inverse = torch.where(s == 0, 0.0, 1 / s).unsqueeze(-1)
        x = self._w * inverse if o is None else (self._w - o.unsqueeze(-1)).mul_(inverse)
        return self._snap(x)

    def _sums(self, q: Tensor) -> _Sums:
        d = (self._hw * q).sum(-1)
        if not self._kind.offset:
            a = (q.square_() if self._h is None else q.square_().mul_(self._h)).sum(-1)
            return _Sums(a, a, self._c, d, self._e)
        hq = q if self._h is None else q * self._h
        return _Sums((hq * q).sum(-1), hq.sum(-1), self._c, d, self._e)

    def _error(self, scales: Scales) -> Tensor:
        """Of blocks [rows, blocks, 1]."""
        s, o = scales.scale, scales.offset
        miss = self._codes(s, o if self._kind.offset else None).mul_(s.unsqueeze(-1))
        if self._kind.offset:
            miss += o.unsqueeze(-1)
        miss.sub_(self._w).square_()
        return (miss if self._h is None else miss.mul_(self._h)).sum((-2, -1)).unsqueeze(-1)

    def _regressed(self, sums: _Sums) -> tuple[Tensor, Tensor]:
        """Least-squares scale and offset [rows, blocks, groups]; 0 where nothing tells the scale."""
        alone = torch.where(sums.a > 0, sums.d / sums.a, 0.0)
        if not self._kind.offset:
            return alone, torch.zeros_like(alone)
        bend = sums.c * sums.a - sums.b.square()
        sound = bend > 1e-6 * sums.c * sums.a
        s = torch.where(sound, (sums.c * sums.d - sums.b * sums.e) / bend, 0.0)
        o = torch.where(sums.c > 0, (sums.e - s * sums.b) / sums.c, 0.0)
        if self._kind.offset == "code":  # only ever subtracted
            s, o = torch.where(o > 0, alone, s), o.clamp(max=0.0)
        return s, o

    def _covering(self) -> tuple[Tensor, Tensor, _Sums]:
        w = self._w
        if self._kind.offset:
            low, high = w.amin(-1), w.amax(-1)
            low = low.clamp(max=0.0) if self._kind.offset == "code" else low
            s, o = (high - low).clamp(min=0.0) / self._high, low
            return s, o, self._sums(self._codes(s, o))
        s, o = self._peak() / self._low, torch.zeros_like(self._e)
        return s, o, self._sums(self._codes(s, None))

    def _peak(self) -> Tensor:
        at = self._w.abs().argmax(-1, keepdim=True)
        return self._w.gather(-1, at).squeeze(-1)

    def _alone(self) -> tuple[Tensor, Tensor, _Sums]:
        """The best scale and offset of each group by itself, with the sums of their codes."""
        s, o, sums = self._covering()
        best = [s, o, *vars(sums).values()]
        gain = -sums.error(s, o)

        def take(s: Tensor, o: Tensor | None) -> None:
            nonlocal best, gain
            sums = self._sums(self._codes(s, o))
            s, o = self._regressed(sums)
            new = -sums.error(s, o)
            better = (new > gain) & (s > 0 if self._kind.offset else s != 0)
            best = [torch.where(better, x, y) for x, y in zip((s, o, *vars(sums).values()), best, strict=True)]
            gain = torch.where(better, new, gain)

        for tried in self._tried(s, o):
            take(*tried)
        for _ in range(2):
            take(best[0], best[1] if self._kind.offset else None)
        return best[0], best[1], _Sums(*best[2:])

    def _tried(self, s: Tensor, o: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        count = max(2, self._steps)
        shortest = 1 - len(self._levels) ** -0.5
        if not self._kind.offset:
            other = s * (self._low / self._high)  # the peak on the other end
            factors = torch.linspace(_LONGEST, shortest, (count + 1) // 2).tolist()
            return [(x * f, None) for f in factors for x in (s, other)]
        tried: list[tuple[Tensor, Tensor | None]] = []
        for f in torch.linspace(_LONGEST, shortest, (count + 2) // 3).tolist():
            span = s * self._high
            for share in (0.0, 0.5, 1.0):  # of what is cut off, at the lower end
                low = o + span * (1 - f) * share
                tried.append((s * f, low.clamp(max=0.0) if self._kind.offset == "code" else low))
        return tried

    def _shared(self, s: Tensor, o: Tensor, sums: _Sums) -> Scales:
        """Scales and offsets of groups on the steps that a block shares."""
        one = torch.ones_like(s)
        if self._kind.scales is None:
            d = half(s)
            if self._kind.offset:
                o = torch.where(sums.c > 0, (sums.e - d * sums.b) / sums.c, o)
            return Scales(d, one, o.half().float(), one)
        weigh = sums.a
        if self._kind.offset:
            weigh = torch.where(sums.c > 0, sums.a - sums.b.square() / sums.c, sums.a).clamp(min=0.0)
        d, c = _multiples(s, weigh + 1e-12 * sums.a.amax(-1, keepdim=True), *self._kind.scales)
        if not self._kind.offset:
            return Scales(d, c, torch.zeros_like(d), one)
        o = torch.where(sums.c > 0, (sums.e - d * c * sums.b) / sums.c, o).clamp(max=0.0)
        m, e = _multiples(-o, sums.c, 0, self._kind.scales[1])
        return Scales(d, c, -m, e)

    def _together(self, scales: Scales) -> Scales:
        """New codes, then scales for them: neighbours in each group, steps of each block."""
        kind = self._kind
        sums = self._sums(self._codes(scales.scale, scales.offset if kind.offset else None))
        if kind.scales is None:
            return self._shared(*self._regressed(sums), sums)
        low, high = kind.scales
        top = -scales.m.new_tensor(0.0) if not kind.offset else scales.m
        best_c, best_e, least = scales.c, scales.e, sums.error(scales.scale, scales.offset)
        for by in (-1, 0, 1):
            c = (scales.c + by).clamp(low, high)
            c = torch.where(c == 0, scales.c, c)
            s, e = scales.d * c, scales.e
            if kind.offset:
                ideal = torch.where(sums.c > 0, (sums.e - s * sums.b) / sums.c, 0.0)
                e = torch.where(top < 0, ideal / top, 0.0).round().clamp(0, high)
            error = sums.error(s, scales.m * e)
            better = error < least
            best_c, best_e = torch.where(better, c, best_c), torch.where(better, e, best_e)
            least = torch.where(better, error, least)
        return self._stepped(sums, Scales(scales.d, best_c, scales.m, best_e))

    def _stepped(self, sums: _Sums, scales: Scales) -> Scales:
        """Least-squares steps of each block."""
        c, e = scales.c, scales.e
        cc, cd = (sums.a * c * c).sum(-1, keepdim=True), (sums.d * c).sum(-1, keepdim=True)
        d, m = torch.where(cc > 0, cd / cc, scales.d), scales.m
        if self._kind.offset:
            ce, ee = (sums.b * c * e).sum(-1, keepdim=True), (sums.c * e * e).sum(-1, keepdim=True)
            ed = (sums.e * e).sum(-1, keepdim=True)
            bend = cc * ee - ce * ce
            sound = bend > 1e-6 * cc * ee
            both = (cd * ee - ed * ce) / bend, (ed * cc - cd * ce) / bend
            sound &= (both[0] > 0) & (both[1] < 0)
            d, m = torch.where(sound, both[0], scales.d), torch.where(sound, both[1], m)
        d = torch.where(d.abs() < _TINY, scales.d, d)
        return Scales(d.half().float(), c, m.half().float(), e)


def half(s: Tensor) -> Tensor:
    """Scales as float16 holds them, none of them 0."""
    s = torch.where(s.abs() < _TINY, torch.where(s < 0, -_TINY, _TINY), s)
    return s.half().float()


def _multiples(s: Tensor, weigh: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The step d [rows, blocks, 1], as float16 holds it, and codes c in low..high, none 0 unless low is, for which
    sum weigh * (s - d c)^2 over the last axis is smallest among those tried. Where low is negative, either sign."""
    peak = s.gather(-1, s.abs().argmax(-1, keepdim=True))
    ends = (low, high) if low < 0 else (high,)
    best_d = best_c = least = None
    for i in range(_STEPS):
        for end in ends:
            d = half(peak / (end * (1 - i / (2 * _STEPS))))
            for _ in range(2):
                c = (s / d).round_().clamp_(low, high)
                if low:
                    c = torch.where(c == 0, 1.0, c)
                cc = (weigh * c * c).sum(-1, keepdim=True)
                better_d = half((weigh * s * c).sum(-1, keepdim=True) / cc)
                error = (weigh * (s - d * c).square()).sum(-1, keepdim=True)
                if best_d is None or best_c is None or least is None:
                    best_d, best_c, least = d, c, error
                else:
                    better = error < least
                    best_d, best_c = torch.where(better, d, best_d), torch.where(better, c, best_c)
                    least = torch.where(better, error, least)
                d = torch.where((cc > 0) & torch.isfinite(better_d), better_d, d)
    assert best_d is not None
    assert best_c is not None
    return best_d, best_c
