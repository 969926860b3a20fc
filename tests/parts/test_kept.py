"""What a pruned linear keeps, as the smallest part that holds it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lilliput.formats.integer import IntegerFormat
from lilliput.parts import kept
from lilliput.parts.bitmask import BitmaskSpec
from lilliput.parts.dense import DensePart, DenseSpec
from lilliput.parts.layer import Layer
from lilliput.parts.pattern import PatternSpec
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec

HALF = torch.float16


def _layer(mask: Tensor | None) -> Layer:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    return Layer("x", weight, support=mask)


def _mask(n: int, m: int) -> Tensor:
    return (torch.arange(16) % m < n).expand(6, 16).clone()


@pytest.mark.parametrize(
    ("pattern", "count", "spec"),
    [
        (None, None, DenseSpec(HALF)),
        (None, 96, DenseSpec(HALF)),
        (None, 90, DenseSpec(HALF)),  # 16 bits saved for each of 6 weights, 96 for the mask: nothing
        (None, 89, BitmaskSpec(89, HALF)),
        (None, 0, BitmaskSpec(0, HALF)),
        ("2:4", 48, PatternSpec(2, 4)),  # places and mask are 96 bits each
        ("1:8", 12, PatternSpec(1, 8)),
        ("1:8", None, PatternSpec(1, 8)),
        ("3:4", 72, BitmaskSpec(72, HALF)),  # 144 bits of places
        ("4:4", 96, DenseSpec(HALF)),
        ("300:600", None, DenseSpec(HALF)),
    ],
)
def test_the_fewest_bytes_win(pattern: str | None, count: int | None, spec: object) -> None:
    assert kept.spec_of(6, 16, HALF, pattern, count) == spec


@pytest.mark.parametrize(
    ("mask", "spec"),
    [
        (_mask(2, 4), PatternSpec(2, 4)),
        (_mask(2, 4), BitmaskSpec(48, HALF)),
        (_mask(2, 4), DenseSpec(HALF)),
        (_mask(0, 4), BitmaskSpec(0, HALF)),
    ],
)
def test_the_part_holds_what_is_kept(mask: Tensor, spec: PatternSpec | BitmaskSpec | DenseSpec) -> None:
    layer = _layer(mask)
    part = kept.part_of(layer, spec)
    assert part.spec == spec
    assert torch.equal(part.decode(), (layer.weight * mask).half().float())
    assert torch.equal(layer.weight, _layer(None).weight)


def test_zeros_elsewhere_than_planned_are_no_part() -> None:
    with pytest.raises(ValueError, match="x was planned with 48 kept weights in float16 and keeps 24"):
        kept.part_of(_layer(_mask(1, 4)), BitmaskSpec(48, HALF))
    with pytest.raises(ValueError, match="is not pruned"):
        kept.part_of(_layer(None), BitmaskSpec(48, HALF))
    with pytest.raises(ValueError, match="holds more"):
        kept.part_of(_layer(_mask(3, 4)), PatternSpec(2, 4))
    with pytest.raises(TypeError, match="not as int4"):
        kept.part_of(_layer(_mask(2, 4)), QuantizedSpec(IntegerFormat(4, True, -1)))


def test_a_layer_is_opened_once_and_its_codes_stay() -> None:
    plain = _layer(None)
    assert kept.opened(plain, None) is plain
    layer = _layer(_mask(2, 4))
    opened = kept.opened(layer, BitmaskSpec(48, HALF))
    assert opened.support is None
    assert torch.equal(opened.decode(), layer.decode().half().float())
    assert torch.equal(opened.rest(), layer.weight - layer.decode().half().float())
    with pytest.raises(ValueError, match="planned without zeros"):
        kept.opened(layer, None)
    form = IntegerFormat(4, True, -1)
    grid = form.fit(layer.decode())
    coded = layer.with_part(QuantizedPart(form, form.encode(layer.decode(), grid), grid))
    assert kept.opened(coded, None) == replace(coded, support=None)
    held = layer.with_part(DensePart(layer.decode()))
    assert kept.opened(held, None).parts == held.parts


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [8, -1, 0])
def test_codes_are_stored_without_those_of_zeros(group: int, symmetric: bool) -> None:
    layer = _layer(_mask(2, 4))
    form = IntegerFormat(4, symmetric, group, HALF)
    held = layer.decode()
    grid = form.fit(held)
    layer = layer.with_part(QuantizedPart(form, form.encode(held, grid), grid))
    spec = kept.coded_spec(form, "2:4", 16)
    assert spec is not None
    part = kept.coded_part(layer, spec)
    assert torch.equal(part.decode(), layer.decode())
    assert part.spec == spec
    packed = part.pack()
    assert {name: (x.dtype, tuple(x.shape)) for name, x in packed.items()} == spec.stored(6, 16)
    out = torch.zeros(6, 16)
    spec.add_to(out, lambda suffix: packed[suffix])
    assert torch.equal(out, layer.decode())
    assert spec.size_bits(6, 16) < form.size_bits(6, 16)


def test_groups_that_a_pattern_does_not_divide_keep_all_codes() -> None:
    assert kept.coded_spec(IntegerFormat(4, True, 6, HALF), "2:4", 16) is None
    assert kept.coded_spec(IntegerFormat(4, True, 8, HALF), None, 16) is None
    assert kept.coded_spec(IntegerFormat(4, True, 8, HALF), "4:4", 16) is None
    spec = kept.coded_spec(IntegerFormat(4, True, 8, HALF), "2:4", 16)
    assert spec is not None
    with pytest.raises(ValueError, match="not pruned"):
        kept.coded_part(_layer(None).with_part(DensePart(torch.ones(6, 16), HALF)), spec)
