"""What methods that train linears stored as codes share: the layer around the codes, and their grid.

A number n of the grid moves as n = start + unit p with a leaf p that begins at 0. The unit of a step, an alpha or a
value vector is the number itself, which keeps its sign; that of a zero point is one code. A p moves by the share of
itself by which the learning rate moves an average weight.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lilliput.formats.format import Format
from lilliput.formats.rounding import through
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.parts.transform import turn_back
from lilliput.training import grids
from lilliput.verbs.train import TrainOptions
from lilliput.verbs.trained import Trained

_LEAST = -0.95  # of a share: a step keeps its sign


class CodedOptions(TrainOptions):
    """What methods with latent weights can be told."""

    start: Literal["codes", "original", "within"] = Field(
        "codes",
        description="where latent weights begin: at what the codes say, which keeps what GPTQ has compensated; at the "
        "weights that they were made of, which keeps what rounding has thrown away; or within the codes at these "
        "weights, which keeps both: a small step turns a code that was a near thing, and none that was chosen against "
        "the nearest",
    )
    keep_zeros: bool = Field(
        False,
        description="weights whose code says 0 stay 0: for a folder that was pruned in another run; what the same "
        "recipe has pruned stays 0 in any case",
    )


def place(scheme: Scheme) -> int | None:
    """The number of the last part that is codes on a grid which can be trained; None where there is none."""
    found = [
        n for n, x in enumerate(scheme.parts) if isinstance(x, QuantizedSpec) and isinstance(x.format, grids.FORMATS)
    ]
    return found[-1] if found else None


def refused(scheme: Scheme, formats: tuple[type, ...] = grids.FORMATS) -> str | None:
    """Why codes of a linear that is stored so cannot be trained: it has none of these formats; None: it has."""
    at = place(scheme)
    part = None if at is None else scheme.parts[at]
    if isinstance(part, QuantizedSpec) and isinstance(part.format, formats):
        return None
    what = f"stored as {scheme.describe()}" if scheme.parts else "a plain linear"
    kinds = {
        "IntegerFormat": "integers",
        "GgmlFormat": "ggml's types",
        "LevelFormat": "tables of levels",
        "TernaryFormat": "ternary codes",
        "BinaryFormat": "binary coding",
        "SignFormat": "signs",
    }
    words = ", ".join(kinds[x.__name__] for x in formats)
    return f"it is {what}, and what is trained are codes of {words}: put a step that makes them before it, such as rtn"


class Coded(Trained):
    """A layer whose codes, or whose grid alone, are trained. moving: the numbers of the grid that are trained; scaled:
    whether their gradients are damped by 1 / sqrt(N highest) for N weights of a step."""

    def __init__(self, layer: Layer, moving: Collection[str], *, scaled: bool = False) -> None:
        super().__init__()
        at = place(Scheme(tuple(x.spec for x in layer.parts)))
        part = None if at is None else layer.parts[at]
        if at is None or not isinstance(part, QuantizedPart):
            raise RuntimeError(f"{layer.name} has no codes, which admits() should have refused")
        # Nothing reads the weight any more, and a number takes no room.
        self.layer = replace(layer, weight=layer.weight.new_zeros(()).expand(layer.weight.shape))
        self.at, self.form = at, part.format
        self.tuned = grids.of(part.format, part.grid, layer.weight.shape[1])
        held = part.decode()
        self._rate = 1.0 / max(float(held.square().mean().sqrt()), 1e-12)
        numbers, sizes = self.tuned.numbers(), self.tuned.sizes()
        count = layer.weight.numel() / max(next(iter(numbers.values())).numel(), 1)
        self._damp = (count * self.tuned.peak) ** -0.5 if scaled else 1.0
        self.names: tuple[str, ...] = ()
        for name, value in numbers.items():
            self.register_buffer(f"start_{name}", value)
            self.names += (name,)
            if name not in moving:
                continue
            self.register_buffer(f"unit_{name}", value if name in self.tuned.positive else sizes[name])
            self.register_parameter(name, nn.Parameter(torch.zeros_like(value)))
        self.register_buffer("others_before", _sum([x.decode() for x in layer.parts[:at]]))
        self.later = len(layer.parts) - at - 1
        for n in range(self.later):
            self.register_buffer(f"others_{n}", layer.parts[at + 1 + n].decode())
        support = layer.support
        if support is not None and not part.format.holds_zero:
            support = None
        self.register_buffer("support", support)

    def rates(self) -> Mapping[str, float]:
        return {name: self._rate for name in self.names if name in self._parameters}

    def _held(self, name: str) -> Tensor:
        value = self._buffers[name]
        if value is None:
            raise RuntimeError(f"{self.layer.name} has no {name}")
        return value

    def numbers(self) -> dict[str, Tensor]:
        """The numbers of the grid for the present leaves, before they are rounded to what a file holds."""
        out: dict[str, Tensor] = {}
        for name in self.names:
            value = self._held(f"start_{name}")
            leaf = self._parameters.get(name)
            if leaf is not None:
                share = self._damp * leaf + (1 - self._damp) * leaf.detach() if self._damp != 1 else leaf + 0.0
                if name in self.tuned.positive:
                    share = through(share, share.detach().clamp(min=_LEAST))
                value = value + self._held(f"unit_{name}") * share
            out[name] = value
        return out

    def value(self) -> Tensor:
        """What the codes stand for, [out, in], differentiable."""
        raise NotImplementedError

    def codes(self) -> tuple[Tensor, Any]:
        """Codes and grid for the present leaves, whose decoding is `value`."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        total = self.value()
        before = self._buffers["others_before"]
        total = total if before is None else before + total
        for n in range(self.later):
            total = total + self._held(f"others_{n}")
        return turn_back(total, self.layer.inputs, self.layer.outputs)

    def finish(self) -> Layer:
        with torch.no_grad():
            part = QuantizedPart(self.form, *self.codes())
        return replace(self.layer, parts=(*self.layer.parts[: self.at], part, *self.layer.parts[self.at + 1 :]))

    def latent_start(self, original: Tensor, o: CodedOptions) -> Tensor:
        """Where latent weights begin, float32 [out, in]; 0 where the layer is pruned, which `support` then says."""
        part = self.layer.parts[self.at]
        if not isinstance(part, QuantizedPart):
            raise RuntimeError(f"{self.layer.name} has no codes, which admits() should have refused")
        held = part.decode()
        latent = held.clone()
        if o.start != "codes":
            others = tuple(x for n, x in enumerate(self.layer.parts) if n != self.at)
            latent = replace(self.layer, weight=original, parts=others, support=None, updated=None).rest()
        if o.start == "within":
            latent = _within(part, self.tuned, held, latent)
        if o.keep_zeros:
            self.register_buffer("support", held != 0)
        support = self._buffers["support"]
        return latent if support is None else torch.where(support, latent, 0.0)

    def supported(self, latent: Tensor) -> Tensor:
        """Latent weights with 0 where the layer is pruned."""
        support = self._buffers["support"]
        return latent if support is None else latent * support


def _sum(parts: list[Tensor]) -> Tensor | None:
    """In the order in which a layer adds its parts, so that the last bits agree."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total + part
    return total


def _within(part: QuantizedPart, tuned: grids.Tuned, held: Tensor, wanted: Tensor) -> Tensor:
    """Other weights [out, in] where the codes are theirs, and inside the window; elsewhere half the way from what the
    codes say to where these would change, to 1/64."""

    def stays(share: Tensor) -> Tensor:
        latent = held + share * (wanted - held)
        same = replace(part, codes=part.format.encode(latent, part.grid)).decode() == held
        return same & tuned.passed(latent, part.grid).bool()

    theirs = stays(torch.ones_like(held))
    low, high = torch.zeros_like(held), torch.ones_like(held)
    for _ in range(6):
        middle = (low + high) / 2
        inside = stays(middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.where(theirs, wanted, held + 0.5 * low * (wanted - held))


class Factors(nn.Module):
    """A product of rank r that begins at 0: left [out, r] is 0, right [r, in] is drawn from N(0, 1/in), differently for
    linears of different names. It counts `scale` times."""

    def __init__(self, name: str, rows: int, width: int, *, rank: int, scale: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        rank = min(rank, rows, width)
        self.left = nn.Parameter(torch.zeros(rows, rank))
        self.right = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self._scale = scale

    def product(self) -> Tensor:
        """[out, in]."""
        return self._scale * (self.left @ self.right)


def format_of(scheme: Scheme) -> Format:
    """The format of the codes that are trained. Raises RuntimeError where there are none."""
    at = place(scheme)
    part = None if at is None else scheme.parts[at]
    if not isinstance(part, QuantizedSpec):
        raise RuntimeError(f"{scheme.describe()} has no codes that can be trained")
    return part.format


def restarts(o: CodedOptions) -> str | None:
    """As `Learning.restarts`."""
    return None if o.start == "codes" else "codes"


def zeroless(scheme: Scheme, o: CodedOptions) -> str | None:
    """Why zeros cannot be kept where it is asked for."""
    form = format_of(scheme)
    if o.keep_zeros and not form.holds_zero:
        return f"{form.describe()} has no code that says 0 on every grid: leave out `keep_zeros`"
    return None
