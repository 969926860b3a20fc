"""What is left of a pruned linear as a part: the smallest of the kinds that hold it exactly."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from lilliput.formats.format import Format
from lilliput.formats.integer import IntegerFormat
from lilliput.parts import bitmask, pattern, tiles
from lilliput.parts.bitmask import BitmaskSpec
from lilliput.parts.dense import DensePart, DenseSpec
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import LowRankSpec
from lilliput.parts.part import Part, PartSpec
from lilliput.parts.pattern import LARGEST, PatternPart, PatternSpec
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.parts.tiles import TilesSpec
from lilliput.parts.transform import turn


def spec_of(
    rows: int, width: int, dtype: torch.dtype, n_of_m: str | None, count: int | None, places: str = "bits"
) -> PartSpec:
    """How a [rows, width] linear is stored of which `count` weights are kept, by the pattern `n_of_m` where it has one:
    by places, by a bit mask, where `places` is "tiles" by tiles too, or dense where nothing takes fewer bytes. `count`
    None: their number is not known."""
    kinds: list[PartSpec] = [DenseSpec(dtype)]
    if n_of_m is not None:
        n, m = (int(x) for x in n_of_m.split(":"))
        kinds += [PatternSpec(n, m, DenseSpec(dtype))] if m <= LARGEST else []
    if count is not None:
        kinds.append(BitmaskSpec(count, dtype))
        kinds += [TilesSpec(count, dtype)] if places == "tiles" else []
    return min(kinds, key=lambda kind: _bytes(kind, rows, width))


def coded_spec(form: Format, n_of_m: str | None, width: int) -> PatternSpec | None:
    """How codes of a [.., width] linear that is pruned to `n_of_m` are stored without those of its zeros: None where
    a group of the grid holds no whole number of the pattern, or the format is another one than integers."""
    if n_of_m is None or not isinstance(form, IntegerFormat):
        return None
    n, m = (int(x) for x in n_of_m.split(":"))
    group = form.group_size
    if m > LARGEST or n == m or width % m or (group > 0 and (group % m or width % group)):
        return None
    compact = form if group <= 0 else replace(form, group_size=group // m * n)
    return PatternSpec(n, m, QuantizedSpec(compact))


def coded_part(layer: Layer, spec: PatternSpec) -> Part:
    """The codes of a pruned layer as `spec`, of `coded_spec`, says. ValueError: it keeps others than planned."""
    (part,) = layer.parts
    if layer.support is None or not isinstance(part, QuantizedPart) or not isinstance(spec.values, QuantizedSpec):
        raise ValueError(f"{layer.name} was planned with {spec.describe()}, and is not pruned and quantized")
    places = pattern.places_of(layer.support.float(), spec.n, spec.m)
    codes = QuantizedPart(spec.values.format, pattern.values_at(part.codes, places, spec.n, spec.m), part.grid)
    result = PatternPart(spec.n, spec.m, codes, places)
    if bool((result.decode() != part.decode()).any()):
        raise ValueError(f"{layer.name} was planned with {spec.describe()} and holds more")
    return result


def apart(scheme: Scheme) -> bool:
    """Whether kept weights under a bit mask can be multiplied by themselves: what is added to them, if anything, are
    products of factors."""
    if not scheme.parts or scheme.inputs or scheme.outputs:
        return False
    return isinstance(scheme.parts[0], BitmaskSpec) and all(isinstance(x, LowRankSpec) for x in scheme.parts[1:])


def part_of(layer: Layer, spec: PartSpec) -> Part:
    """The kept weights of a layer without parts as `spec`, of `spec_of`, says, between its transforms. ValueError: it
    keeps others."""
    weight, planned = layer.decode(), f"{layer.name} was planned with {spec.describe()}"
    if isinstance(spec, DenseSpec):
        return DensePart(turn(weight, layer.inputs, layer.outputs), spec.dtype)
    if layer.support is None:
        raise ValueError(f"{planned} and is not pruned")
    part: Part
    if isinstance(spec, BitmaskSpec | TilesSpec):
        kept, dtype = int(layer.support.sum()), spec.dtype
        if kept != spec.count:
            raise ValueError(f"{planned} and keeps {kept}")
        gather = bitmask.gather if isinstance(spec, BitmaskSpec) else tiles.gather
        part = gather(weight, layer.support, dtype)
    elif isinstance(spec, PatternSpec) and isinstance(spec.values, DenseSpec):
        dtype = spec.values.dtype
        part = pattern.gather(weight, layer.support.float(), spec.n, spec.m, dtype)
    else:
        raise TypeError(f"kept weights are stored dense, by places, a bit mask or tiles, not as {spec.describe()}")
    if bool((part.decode() != weight.to(dtype)).any()):
        raise ValueError(f"{planned} and holds more")
    return part


def opened(layer: Layer, first: PartSpec | None) -> Layer:
    """A pruned layer for a step that fills its zeros: its kept weights become the part `first` where it has no parts
    yet, and it is no longer bound to its support. A layer that is not pruned stays as it is.

    Raises ValueError where the layer keeps other weights than planned, or is pruned and was not planned so.
    """
    if layer.support is None:
        return layer
    if layer.parts:  # codes, which hold the zeros
        return replace(layer, support=None)
    if first is None:
        raise ValueError(f"{layer.name} is pruned, and was planned without zeros")
    return replace(layer.with_part(part_of(layer, first)), support=None)


def _bytes(spec: PartSpec, rows: int, width: int) -> int:
    return sum(dtype.itemsize * prod(shape) for dtype, shape in spec.stored(rows, width).values())
