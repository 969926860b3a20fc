"""Linears of a folder as layers: codes, grids and transforms as they are stored, nothing decoded and encoded anew."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lilliput.errors import SourceError
from lilliput.formats.bits import unpack_words
from lilliput.formats.integer import IntegerFormat, IntegerGrid
from lilliput.parts import scheme as schemes
from lilliput.parts import transform
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.layer import Layer
from lilliput.parts.part import Get, Part, PartSpec, below
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import ACTIVATION, Scheme
from lilliput.source.packed import Scaled
from lilliput.source.source import Source


@dataclass(frozen=True)
class HeldPart:
    """A term as the file holds it. tensors: by suffix, as `spec.stored` describes them for [rows, width]."""

    spec: PartSpec
    height: int
    width: int
    tensors: dict[str, Tensor]

    def decode(self) -> Tensor:
        out = torch.zeros(self.height, self.width)
        self.spec.add_to(out, self.tensors.__getitem__)
        return out

    def bits(self) -> int:
        return self.spec.size_bits(self.height, self.width)

    def pack(self) -> dict[str, Tensor]:
        return self.tensors

    def rows(self, start: int, stop: int) -> HeldPart:
        raise SourceError("the rows of a part that is held as stored belong together")


def layer(source: Source, stored: str, name: str, rows: int, width: int, *, transposed: bool = False) -> Layer:
    """The linear whose weight is stored under `stored` (without ".weight"), [rows, width], as it lies in the folder.

    A plain one has no parts; `transposed`: the folder holds it as [width, rows]. Raises SourceError for a packing of
    another engine that is not codes of integers.
    """
    key = f"{stored}.weight"
    spec, packed = source.linear(key), source.packing(key)
    weight = source.read(key).float()
    if weight.shape != (rows, width) or (transposed and spec is None and packed is None):  # square ones do not show it
        weight = weight.T.contiguous()
    plain = Layer(name, weight)
    if spec is not None:
        get = below(source.part, spec.payload)
        parts = tuple(_part(x, rows, width, below(get, schemes.prefix(n))) for n, x in enumerate(spec.scheme.parts))
        activation = spec.scheme.activation
        grid = None
        if activation is not None:
            grid = InputGrid(activation, {x: get(f"{ACTIVATION}{x}") for x in activation.stored(width)})
        return replace(
            plain,
            parts=parts,
            inputs=tuple(transform.load("in", spec.scheme.inputs, width, get)),
            outputs=tuple(transform.load("out", spec.scheme.outputs, rows, get)),
            activation=grid,
        )
    if packed is None:
        return plain
    if isinstance(packed, Scaled) and packed.bits is not None and packed.order is None:
        return replace(plain, parts=(_scaled(source, packed, rows, width),))
    raise SourceError(f"{key} is stored in a form whose codes cannot be taken up: give a folder of integers")


def _part(spec: PartSpec, rows: int, width: int, get: Get) -> Part:
    if isinstance(spec, QuantizedSpec):
        return QuantizedPart(spec.format, *spec.format.unpack(get, rows, width, 0, rows))
    return HeldPart(spec, rows, width, {suffix: get(suffix) for suffix in spec.stored(rows, width)})


def integer_format(source: Source, packed: Scaled) -> IntegerFormat:
    """The grid of a weight of compressed-tensors."""
    shape = source.entry(packed.scale).shape
    width, groups = packed.shape[1], shape[1] if len(shape) > 1 else 1
    size = -1 if groups == 1 else packed.block[1] if packed.order is None else width // groups
    return IntegerFormat(packed.bits or 0, packed.zero is None, size, source.entry(packed.scale).dtype)


def _scaled(source: Source, packed: Scaled, rows: int, width: int) -> QuantizedPart:
    form = integer_format(source, packed)
    codes = unpack_words(source.part(packed.codes), form.bits, width)
    scale = source.part(packed.scale)
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    zero = None
    if packed.zero is not None:
        zero = source.part(packed.zero)
        if packed.zero_packed:
            zero = unpack_words(zero.T, form.bits, rows).T
        zero = zero.reshape(-1, scale.shape[1]).to(torch.int8)
    return QuantizedPart(form, codes.to(torch.int8), IntegerGrid(scale, zero))


def scheme(source: Source, stored: str) -> Scheme:
    """What a linear is stored as, without its tensors. Raises SourceError as `layer` does."""
    key = f"{stored}.weight"
    spec, packed = source.linear(key), source.packing(key)
    if spec is not None:
        return spec.scheme
    if packed is None:
        return Scheme()
    if isinstance(packed, Scaled) and packed.bits is not None and packed.order is None:
        return schemes.quantized(integer_format(source, packed))
    raise SourceError(f"{key} is stored in a form whose codes cannot be taken up: give a folder of integers")
