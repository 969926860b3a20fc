"""Run-time transforms of a linear's inputs or outputs: y = T_out^-1 (sum of parts) T_in x.

A side of a layer may have several: x meets the first of `inputs` first. Rotations and permutations come from a seed and
take no room in the file; scales are stored. All of them act on vectors in the last dimension, in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lilliput.algebra import hadamard
from lilliput.errors import PlanError, SourceError
from lilliput.formats.format import Stored, dtype_name, dtype_of
from lilliput.parts.flat import FlatSpec
from lilliput.parts.part import Get, below
from lilliput.parts.reassembled import ReassembledSpec


class Transform(Protocol):
    """An invertible linear map T of vectors of one width."""

    @property
    def spec(self) -> TransformSpec:
        """What the plan knew of it."""
        ...

    def apply(self, x: Tensor) -> Tensor:
        """T x."""
        ...

    def undo(self, x: Tensor) -> Tensor:
        """T^-1 x."""
        ...

    def adjoint(self, x: Tensor) -> Tensor:
        """TT x."""
        ...

    def undo_adjoint(self, x: Tensor) -> Tensor:
        """T^-T x."""
        ...

    def pack(self) -> dict[str, Tensor]:
        """The tensors that `spec.stored` describes."""
        ...


class TransformSpec(Protocol):
    """A transform before its values; frozen and comparable."""

    def describe(self) -> str: ...

    def stored(self, width: int) -> Stored:
        """Tensors in the file, by suffix."""
        ...

    def operations(self, width: int) -> int:
        """Multiplications and additions that one vector takes."""
        ...

    def load(self, width: int, get: Get) -> Transform:
        """The transform of vectors [width], with its stored tensors."""
        ...

    def plain(self) -> dict[str, Any]:
        """The entry of config.json, with the transform's `kind`; `from_plain` reads it back."""
        ...


@dataclass(frozen=True)
class ScaleSpec:
    """A factor for each entry, stored in `dtype`."""

    dtype: torch.dtype = torch.float16

    def describe(self) -> str:
        return f"scales {dtype_name(self.dtype)}"

    def stored(self, width: int) -> Stored:
        return {"": (self.dtype, (width,))}

    def operations(self, width: int) -> int:
        return width

    def load(self, width: int, get: Get) -> Scale:
        return Scale(get(""))

    def plain(self) -> dict[str, Any]:
        return {"kind": "scale", "dtype": dtype_name(self.dtype)}


@dataclass(frozen=True)
class Scale:
    """x times `factor` [width], as it is stored; no factor is 0 or not finite."""

    factor: Tensor

    @property
    def spec(self) -> ScaleSpec:
        return ScaleSpec(self.factor.dtype)

    def apply(self, x: Tensor) -> Tensor:
        return x * self.factor.to(x.device).float()

    def undo(self, x: Tensor) -> Tensor:
        return x / self.factor.to(x.device).float()

    adjoint = apply
    undo_adjoint = undo

    def pack(self) -> dict[str, Tensor]:
        return {"": self.factor.contiguous()}


@dataclass(frozen=True)
class Rotation:
    """A random orthogonal matrix that is cheap to apply, from `seed`; spec and transform in one.

    "hadamard": random signs, a Hadamard transform of blocks of the largest order that divides n, and, where that leaves
    c > 1 blocks, a random orthogonal matrix of order c across them, so that every entry meets every other (n sqrt(n) +
    n c; QuIP#, arXiv 2402.04396). An odd n has blocks of one entry: c = n.
    "kronecker": a random permutation, then the Kronecker product of two random orthogonal matrices of p and q entries,
    p q = n, p and q as close as they can be (n (p + q); QuIP, arXiv 2307.13304).
    """

    kind: Literal["hadamard", "kronecker"]
    seed: int

    @property
    def spec(self) -> Rotation:
        return self

    def describe(self) -> str:
        return f"{self.kind} rotation"

    def stored(self, width: int) -> Stored:
        return {}

    def operations(self, width: int) -> int:
        if self.kind == "hadamard":
            order = hadamard_order(width)
            mixing = width // order
            return width * (1 + 2 * sum(hadamard.sides(order)) + (2 * mixing if mixing > 1 else 0))
        return 2 * width * sum(sides(width))

    def load(self, width: int, get: Get) -> Rotation:
        return self

    def plain(self) -> dict[str, Any]:
        return {"kind": self.kind, "seed": self.seed}

    def pack(self) -> dict[str, Tensor]:
        return {}

    def apply(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        if self.kind == "hadamard":
            signs, mixing = (t.to(x) for t in _signs_and_mixing(width, self.seed))
            grid = (x * signs).reshape(*x.shape[:-1], len(mixing), -1)
            mixed = hadamard.transform(grid)
            return (mixed if len(mixing) == 1 else mixing @ mixed).reshape(x.shape)
        left, right, order = (t.to(x.device) for t in _kronecker(width, self.seed))
        grid = x[..., order].reshape(*x.shape[:-1], len(left), len(right))
        return (left.to(x) @ grid @ right.to(x).T).reshape(x.shape)

    def undo(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        if self.kind == "hadamard":
            signs, mixing = (t.to(x) for t in _signs_and_mixing(width, self.seed))
            grid = x.reshape(*x.shape[:-1], len(mixing), -1)
            grid = grid if len(mixing) == 1 else mixing.T @ grid
            return hadamard.transform(grid, transposed=True).reshape(x.shape) * signs
        left, right, order = (t.to(x.device) for t in _kronecker(width, self.seed))
        grid = x.reshape(*x.shape[:-1], len(left), len(right))
        mixed = (left.to(x).T @ grid @ right.to(x)).reshape(x.shape)
        return mixed[..., order.argsort()]

    adjoint = undo
    undo_adjoint = apply


def hadamard_order(width: int) -> int:
    """The largest order of a Hadamard transform that divides `width`; 1 for an odd width."""
    for count in range(1, width + 1):
        if width % count == 0:
            try:
                hadamard.factor(width // count)
            except PlanError:
                continue
            return width // count
    return 1


@functools.lru_cache(maxsize=16)
def _signs_and_mixing(width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Signs int64 [width], and the float64 matrix [c, c] across the c blocks."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.int64).mul_(2).sub_(1)
    count = width // hadamard_order(width)
    return signs, torch.ones(1, 1, dtype=torch.float64) if count == 1 else _orthogonal(count, generator)


def sides(width: int) -> tuple[int, int]:
    """Two factors of `width`, as close as they can be, the smaller first."""
    p = max(d for d in range(1, math.isqrt(width) + 1) if width % d == 0)
    return p, width // p


@functools.lru_cache(maxsize=16)
def _kronecker(width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both factors, float64, and the permutation, int64 [width]."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (_orthogonal(n, generator) for n in sides(width))
    return left, right, torch.randperm(width, generator=generator)


def _orthogonal(width: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    out: Tensor = q * r.diagonal().sign()
    return out


def from_plain(plain: Mapping[str, Any]) -> TransformSpec:
    """The transform that config.json describes. Raises SourceError for a kind that this code does not know."""
    if plain["kind"] == "scale":
        return ScaleSpec(dtype_of(plain["dtype"]))
    if plain["kind"] in ("hadamard", "kronecker"):
        return Rotation(plain["kind"], int(plain["seed"]))
    if plain["kind"] == "flat":
        return FlatSpec(int(plain["p"]))
    if plain["kind"] == "reassembled":
        return ReassembledSpec(int(plain["extra"]))
    raise SourceError(
        f"a transform of kind {plain['kind']!r} is newer than this lilliput: install the version that wrote it"
    )


def turn(weight: Tensor, inputs: Sequence[Transform], outputs: Sequence[Transform]) -> Tensor:
    """T_out W T_in^-1, float32: what the parts of a layer add up to."""
    for t in inputs:
        weight = t.undo_adjoint(weight)
    for t in outputs:
        weight = t.apply(weight.T).T
    return weight


def turn_back(total: Tensor, inputs: Sequence[Transform], outputs: Sequence[Transform]) -> Tensor:
    """T_out^-1 P T_in, float32: the weight of a layer whose parts add up to P."""
    for t in reversed(outputs):
        total = t.undo(total.T).T
    for t in reversed(inputs):
        total = t.adjoint(total)
    return total


def pull(slope: Tensor, inputs: Sequence[Transform], outputs: Sequence[Transform]) -> Tensor:
    """The gradient by P of a function whose gradient by `turn_back(P)` is `slope`."""
    for t in inputs:
        slope = t.apply(slope)
    for t in outputs:
        slope = t.undo_adjoint(slope.T).T
    return slope


def names(side: Literal["in", "out"], specs: Sequence[TransformSpec], width: int) -> Stored:
    """The stored tensors of one side's transforms, by suffix of the linear's payload name."""
    return {f"_{side}{n}{suffix}": x for n, spec in enumerate(specs) for suffix, x in spec.stored(width).items()}


def load(side: Literal["in", "out"], specs: Sequence[TransformSpec], width: int, get: Get) -> list[Transform]:
    """Undo `pack`."""
    return [spec.load(width, below(get, f"_{side}{n}")) for n, spec in enumerate(specs)]


def pack(side: Literal["in", "out"], transforms: Sequence[Transform]) -> dict[str, Tensor]:
    """The tensors that `names` describes."""
    return {f"_{side}{n}{suffix}": x for n, t in enumerate(transforms) for suffix, x in t.pack().items()}
