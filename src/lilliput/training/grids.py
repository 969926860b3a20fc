"""Grids under training: what codes stand for while the numbers of their grid move, and gradients for both.

A latent weight w takes the nearest code c of its grid, and stands for its value v, by the format's own encoding and
decoding, so that training computes what a file will hold. With g = dL/dv,

    dL/dw = g p,    p: 1 inside the window of the codes, 0 outside (straight through; Bengio et al. 2013, 1308.3432)
    dL/dS = sum g (v - p w) / S     for the step S of a unit of weights (LSQ; Esser et al. 2020, 1902.08153)
    dL/dZ = - sum g S (1 - p)       for its zero point Z
    dL/dalpha_i = sum g b_i, dL/doffset = sum g    for binary coding, always with p = 1
    dL/da_i = sum_j g b_j s, dL/db_j = sum_i g a_i s, p = a_i b_j (1.001 - tanh(w)^2)    for signs s of a_i b_j s.

Codes that stay are the case p = 0. Numbers are rounded to what a file holds, and gradients pass that.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lilliput.algebra import ranges
from lilliput.formats import groups
from lilliput.formats.binary import BinaryFormat, BinaryGrid
from lilliput.formats.format import Format
from lilliput.formats.ggml import GgmlFormat
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.levels import LevelFormat
from lilliput.formats.rounding import through
from lilliput.formats.scales import PowerScales, Scales
from lilliput.formats.sign import SignFormat, SignGrid
from lilliput.formats.ternary import TernaryFormat, TernaryGrid

_CHUNK = 1 << 16  # weights worked on at a time
FORMATS = (IntegerFormat, GgmlFormat, LevelFormat, TernaryFormat, BinaryFormat, SignFormat)
Numbers = Mapping[str, Tensor]


def moved(grid: Any, device: torch.device) -> Any:
    """A grid with all of its tensors on a device."""
    if isinstance(grid, Tensor):
        return grid.to(device)
    if isinstance(grid, tuple):
        return tuple(moved(x, device) for x in grid)
    if not is_dataclass(grid) or isinstance(grid, type):
        return grid
    own = {x.name: getattr(grid, x.name) for x in fields(grid)}
    kept = {name: moved(x, device) for name, x in own.items() if isinstance(x, Tensor | tuple)}
    return replace(grid, **kept)


@dataclass(frozen=True)
class Shares:
    """How the weights [rows, width] of a matrix share numbers [units]; group: as `IntegerFormat.group_size`."""

    width: int
    group: int

    def spread(self, numbers: Tensor) -> Tensor:
        """numbers [rows or 1, groups, ..] for each weight, [rows or 1, width, ..]."""
        if numbers.shape[1] == 1:
            return numbers.expand(-1, self.width, *numbers.shape[2:])
        if self.width % self.group == 0:
            return numbers.repeat_interleave(self.group, 1)
        return numbers[:, groups.index(self.width, self.group, numbers.device)]

    def gather(self, values: Tensor) -> Tensor:
        """The sums [units] of values [rows, width]."""
        if self.group == 0:
            return values.sum().reshape(1, 1)
        if self.group < 0 or self.group >= self.width:
            return values.sum(1, keepdim=True)
        if self.width % self.group == 0:
            return values.view(len(values), -1, self.group).sum(2)
        out = values.new_zeros(len(values), groups.count(self.width, self.group))
        return out.index_add_(1, groups.index(self.width, self.group, values.device), values)


class Tuned(ABC):
    """The grid of one matrix: its numbers, float32, and what moves with them. peak: the largest code, which damps the
    gradients of steps; positive: the numbers that move by shares of themselves, and keep their sign."""

    positive: tuple[str, ...]
    peak: int = 1

    def __init__(self, form: Format, grid: Any) -> None:
        self.form, self.start = form, grid

    @abstractmethod
    def numbers(self) -> Numbers:
        """Those that it starts with."""

    @abstractmethod
    def closed(self, numbers: Numbers) -> Any:
        """The format's grid with these numbers, as a file holds them."""

    @abstractmethod
    def opened(self, grid: Any) -> Numbers:
        """The numbers of a grid."""

    @abstractmethod
    def passed(self, latent: Tensor, grid: Any) -> Tensor:
        """p [rows, width] of the module's docstring, bool or float32."""

    @abstractmethod
    def slopes(self, slope: Tensor, codes: Tensor, grid: Any, latent: Tensor | None, passed: Tensor | None) -> Numbers:
        """The gradients by the numbers; latent and passed None: the codes stay."""

    def rounded(self, latent: Tensor, grid: Any) -> tuple[Tensor, Tensor | None]:
        """The values of latent weights, and their codes where `pulled` wants them."""
        codes = self.form.encode(latent, grid)
        return self.form.decode(codes, grid), codes

    def pulled(
        self, slope: Tensor, latent: Tensor, codes: Tensor | None, grid: Any, wanted: bool
    ) -> tuple[Tensor, Numbers]:
        """The gradients by latent weights, and those by the numbers where they are wanted."""
        if codes is None:
            raise RuntimeError("rounded() keeps the codes")
        passed = self.passed(latent, grid)
        return slope * passed, self.slopes(slope, codes, grid, latent, passed) if wanted else {}

    def sizes(self) -> Numbers:
        """Units in which the numbers that are no `positive` ones move."""
        return {}

    def anew(self, latent: Tensor) -> tuple[Any, Tensor]:
        """The grid that a weight [rows, width] would be given without any search, and what is encoded in its place."""
        return self.form.fit(latent), latent


class Stepped(Tuned):
    """One step for each unit of weights, and maybe a zero point: integers, ggml's types, levels, ternary codes."""

    positive = ("scale",)

    def __init__(self, form: IntegerFormat | GgmlFormat | LevelFormat | TernaryFormat, grid: Any, width: int) -> None:
        super().__init__(form, grid)
        self._form = form
        self._shares = Shares(width, form.group_size)
        self.zeros = isinstance(form, IntegerFormat | GgmlFormat) and not form.symmetric
        if isinstance(form, IntegerFormat | GgmlFormat):
            self.peak = max(form.highest, 1)
        elif isinstance(form, LevelFormat):
            self.peak = 1 << (form.bits - 1)

    def numbers(self) -> Numbers:
        return self.opened(self.start)

    def opened(self, grid: Any) -> Numbers:
        if isinstance(grid, Scales):
            return {"scale": grid.values()}
        if isinstance(grid, TernaryGrid):
            return {"scale": grid.scale.float()}
        scale, zero = self._opened(grid)
        return {"scale": scale, "zero": torch.where(scale == 0, 0.0, zero)} if self.zeros else {"scale": scale}

    def _opened(self, grid: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(self._form, IntegerFormat | GgmlFormat):
            raise RuntimeError(f"{self._form.describe()} has no zero points")
        return self._form.opened(grid)

    def closed(self, numbers: Numbers) -> Any:
        scale = numbers["scale"].detach()
        form, grid = self._form, moved(self.start, scale.device)
        if isinstance(form, LevelFormat):
            top = form.on(scale).top
            peak = scale * top
            if isinstance(form.scales, PowerScales):
                # It takes the octave of the peak and of the largest level: this one is nearest to the scale.
                peak = scale * 2 ** (math.floor(math.log2(top)) + 0.5)
            return Scales(form.scales, form.scales.coded(peak, top, grid.second), grid.second)
        if isinstance(form, TernaryFormat):
            return TernaryGrid(ranges.stored(scale, form.scale_dtype).to(form.scale_dtype))
        zero = numbers["zero"].detach() if self.zeros else torch.zeros_like(scale)
        return form.closed(*form.nearest(scale, zero, grid), grid)

    def passed(self, latent: Tensor, grid: Any) -> Tensor:
        form, own = self._form, self.opened(grid)
        inverse = torch.where(own["scale"] == 0, torch.inf, own["scale"].reciprocal())
        at = latent * self._shares.spread(inverse)
        if isinstance(form, IntegerFormat | GgmlFormat):
            table = form.levels(latent.device)
            low, high = float(form.lowest), float(form.highest)
            if table is not None:
                low, high = float(table[0]), float(table[-1])
            if self.zeros:
                at = at + self._shares.spread(own["zero"])
            edge = 0.5 if table is None else 0.0
        elif isinstance(form, LevelFormat):
            levels, edge = form.on(latent).levels, 0.0
            low, high = float(levels[0]), float(levels[-1])
        else:
            low, high, edge = -1.0, 1.0, 0.5
        return (at >= low - edge) & (at <= high + edge)

    def slopes(self, slope: Tensor, codes: Tensor, grid: Any, latent: Tensor | None, passed: Tensor | None) -> Numbers:
        own = self.opened(grid)
        off = self.form.decode(codes, grid)
        if latent is not None and passed is not None:
            off = off - latent * passed
        inverse = torch.where(own["scale"] == 0, 0.0, own["scale"].reciprocal())
        out = {"scale": self._shares.gather(slope * off) * inverse}
        if self.zeros:
            outside = slope if passed is None else slope * ~passed
            out["zero"] = -self._shares.gather(outside) * own["scale"]
        return out

    def sizes(self) -> Numbers:
        return {"zero": torch.ones_like(self.numbers()["zero"])} if self.zeros else {}

    def anew(self, latent: Tensor) -> tuple[Any, Tensor]:
        """Ternary codes: 0 up to Delta = 0.7 mean |w|, S = mean |w| over what is above it (Li et al. 2016, arXiv
        1605.04711)."""
        form = self._form
        if not isinstance(form, TernaryFormat):
            return form.fit(latent, search="minmax"), latent
        size, shares = latent.abs(), self._shares
        count = shares.gather(torch.ones_like(size))
        above = (size > shares.spread(0.7 * shares.gather(size) / count)).to(size.dtype)
        grid = self.closed({"scale": shares.gather(size * above) / shares.gather(above).clamp(min=1.0)})
        return grid, latent.sign() * above * shares.spread(grid.scale.float())


class Integers(Stepped):
    """Steps of integers, a few rows at a time through all that is computed of them, so that these stay in a cache."""

    def __init__(self, form: IntegerFormat, grid: Any, width: int) -> None:
        super().__init__(form, grid, width)
        self._integers = form

    def _pieces(self, latent: Tensor, grid: Any) -> Iterator[_Piece]:
        """Latent weights in units of their steps, rounded, and with the codes' ends."""
        form = self._integers
        scale, zero = self._opened(grid)
        inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
        low, high = form.lowest - zero, form.highest - zero
        rows, width = latent.shape
        step = max(1, _CHUNK // width)
        for columns, units, size in groups.pieces(width, form.group_size):
            for a in range(0, rows, step):
                at = slice(a, min(a + step, rows))
                own = at if len(scale) == rows else slice(0, 1)
                some = [x[own, units].unsqueeze(-1) for x in (scale, inverse, low, high)]
                exact = groups.split(latent[at, columns], size) * some[1]
                whole = exact.round()
                yield _Piece(at, columns, own, units, size, some[0], exact, whole, torch.clamp(whole, some[2], some[3]))

    def rounded(self, latent: Tensor, grid: Any) -> tuple[Tensor, Tensor | None]:
        out = torch.empty_like(latent)
        for x in self._pieces(latent, grid):
            torch.mul(x.code, x.scale, out=groups.split(out[x.rows, x.columns], x.size))
        return out, None

    def pulled(
        self, slope: Tensor, latent: Tensor, codes: Tensor | None, grid: Any, wanted: bool
    ) -> tuple[Tensor, Numbers]:
        scale = self._opened(grid)[0]
        by_latent, by_scale, outside = torch.empty_like(latent), torch.zeros_like(scale), torch.zeros_like(scale)
        for x in self._pieces(latent, grid):
            own = groups.split(slope[x.rows, x.columns], x.size)
            passed = groups.split(by_latent[x.rows, x.columns], x.size)
            torch.mul(own, x.whole == x.code, out=passed)
            if not wanted:
                continue
            by_step = (own * x.code).addcmul_(passed, x.exact, value=-1).sum(-1)
            outside_step = (own - passed).sum(-1) if self.zeros else None
            if len(by_scale) == 1 < len(latent):
                by_step, outside_step = by_step.sum(0), None if outside_step is None else outside_step.sum(0)
            by_scale[x.own, x.units] += by_step
            if outside_step is not None:
                outside[x.own, x.units] += outside_step
        if not wanted:
            return by_latent, {}
        out = {"scale": torch.where(scale == 0, 0.0, by_scale)}
        return by_latent, {**out, "zero": -outside * scale} if self.zeros else out


@dataclass(frozen=True)
class _Piece:
    """Some rows and groups [rows, groups, size]: weights in steps, these rounded, and cut to codes less zero points;
    scale [.., groups, 1]; own, units: where the grid has it."""

    rows: slice
    columns: slice
    own: slice
    units: slice
    size: int
    scale: Tensor
    exact: Tensor
    whole: Tensor
    code: Tensor


class Sums(Tuned):
    """Alphas and an offset for each unit: binary coding."""

    positive = ("alpha",)

    def __init__(self, form: BinaryFormat, grid: BinaryGrid, width: int) -> None:
        super().__init__(form, grid)
        self._form = form
        self._shares = Shares(width, form.group_size)

    def numbers(self) -> Numbers:
        return self.opened(self.start)

    def opened(self, grid: Any) -> Numbers:
        return {"alpha": grid.alpha.float(), "offset": grid.offset.float()}

    def closed(self, numbers: Numbers) -> BinaryGrid:
        dtype = self._form.scale_dtype
        return BinaryGrid(numbers["alpha"].detach().to(dtype), numbers["offset"].detach().to(dtype))

    def passed(self, latent: Tensor, grid: Any) -> Tensor:
        return torch.ones_like(latent, dtype=torch.bool)

    def slopes(self, slope: Tensor, codes: Tensor, grid: Any, latent: Tensor | None, passed: Tensor | None) -> Numbers:
        bits = self._form.bits
        whole = codes.long() + (1 << (bits - 1))
        sums = [self._shares.gather(slope * ((whole >> i & 1) * 2 - 1)) for i in range(bits)]
        return {"alpha": torch.stack(sums, -1), "offset": self._shares.gather(slope)}

    def sizes(self) -> Numbers:
        return {"offset": self.numbers()["alpha"].abs().mean(-1)}


class Signs(Tuned):
    """A value for each output and each input."""

    positive = ("left", "right")

    def numbers(self) -> Numbers:
        return self.opened(self.start)

    def opened(self, grid: Any) -> Numbers:
        return {"left": grid.left.float(), "right": grid.right.float()}

    def closed(self, numbers: Numbers) -> SignGrid:
        dtype = self.start.left.dtype
        return SignGrid(numbers["left"].detach().to(dtype), numbers["right"].detach().to(dtype))

    def passed(self, latent: Tensor, grid: Any) -> Tensor:
        own = self.opened(grid)
        return (1.001 - latent.tanh().square()) * own["left"][:, None] * own["right"]

    def slopes(self, slope: Tensor, codes: Tensor, grid: Any, latent: Tensor | None, passed: Tensor | None) -> Numbers:
        signed = slope * (2 * codes + 1)
        return {"left": signed @ grid.right.float(), "right": grid.left.float() @ signed}


def of(form: Format, grid: Any, width: int) -> Tuned:
    """The grid of codes [out, width] under training. Raises RuntimeError for a format that is none of `FORMATS`."""
    if isinstance(form, BinaryFormat):
        return Sums(form, grid, width)
    if isinstance(form, SignFormat):
        return Signs(form, grid)
    if isinstance(form, IntegerFormat):
        return Integers(form, grid, width)
    if isinstance(form, GgmlFormat | LevelFormat | TernaryFormat):
        return Stepped(form, grid, width)
    raise RuntimeError(f"{form.describe()} is not trained")


class _Meant(torch.autograd.Function):
    """See the module's docstring. Numbers are as a file holds them, in the order of `names`."""

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor | None, codes: Tensor | None, tuned: Tuned, names: tuple[str, ...], *numbers: Tensor
    ) -> Tensor:
        grid = tuned.closed(dict(zip(names, numbers, strict=True)))
        if codes is not None:
            value = tuned.form.decode(codes, grid)
        elif latent is not None:
            value, codes = tuned.rounded(latent, grid)
        else:
            raise RuntimeError("neither codes nor latent weights")
        ctx.save_for_backward(latent, codes)
        ctx.tuned, ctx.names, ctx.grid = tuned, names, grid
        return value

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = slopes
        latent, codes = ctx.saved_tensors
        tuned: Tuned = ctx.tuned
        wanted = any(ctx.needs_input_grad[4:])
        if latent is None:
            by_latent, own = None, tuned.slopes(slope, codes, ctx.grid, None, None) if wanted else {}
        else:
            by_latent, own = tuned.pulled(slope, latent, codes, ctx.grid, wanted)
        return (by_latent, None, None, None, *(own.get(name) for name in ctx.names))


def meant(tuned: Tuned, numbers: Numbers, *, latent: Tensor | None = None, codes: Tensor | None = None) -> Tensor:
    """The values [rows, width] of latent weights or of codes that stay; gradients to latent weights and numbers."""
    stored = tuned.opened(tuned.closed(numbers))
    near = {name: through(x, stored[name]) for name, x in numbers.items()}
    out: Tensor = _Meant.apply(latent, codes, tuned, tuple(near), *near.values())  # type: ignore[no-untyped-call]
    return out
