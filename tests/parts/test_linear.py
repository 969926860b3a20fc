"""The native layout: description, packing, reading, and what a damaged entry says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lilliput.errors import SourceError
from lilliput.formats.integer import IntegerFormat, IntegerGrid
from lilliput.parts.dense import DenseSpec
from lilliput.parts.linear import LinearSpec, decode, parse_config, plain_config, read_linear
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme, quantized


def packed(name: str, fmt: IntegerFormat, codes: torch.Tensor, grid: IntegerGrid) -> dict[str, torch.Tensor]:
    return {name + suffix: x for suffix, x in QuantizedPart(fmt, codes, grid).pack().items()}


def made(
    fmt: IntegerFormat, rows: int = 5, width: int = 70
) -> tuple[LinearSpec, dict[str, torch.Tensor], torch.Tensor]:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    grid = fmt.fit(weight)
    codes = fmt.encode(weight, grid)
    spec = LinearSpec("a.b", "a.b", rows, width, quantized(fmt))
    return spec, packed("a.b.weight", fmt, codes, grid), fmt.decode(codes, grid)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, -1, 32, 70, 100])
def test_reads_back_what_was_decoded(bits: int, symmetric: bool, group: int) -> None:
    spec, tensors, expected = made(IntegerFormat(bits, symmetric, group, torch.float16))
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == spec.describe()
    assert torch.equal(read_linear(tensors, spec), expected)
    assert torch.equal(decode(spec, tensors.__getitem__, torch.bfloat16), expected.to(torch.bfloat16))


def test_many_rows_are_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, tensors, expected = made(IntegerFormat(4, False, 32, torch.float16), rows=37)
    monkeypatch.setattr("lilliput.parts.quantized.CHUNK", 200)
    assert torch.equal(read_linear(tensors, spec), expected)


def test_parts_add_up_before_rounding() -> None:
    fmt = IntegerFormat(4, True, -1, torch.float32)
    codes, grid = torch.ones(2, 3, dtype=torch.int8), IntegerGrid(torch.ones(2, 1))
    spec = LinearSpec("x", "x", 2, 3, Scheme((QuantizedSpec(fmt), DenseSpec(torch.float32))), transposed=True)
    tensors = packed("x.weight", fmt, codes, grid)
    tensors["x.weight_1"] = torch.full((6,), 2.0**-9)
    assert torch.equal(read_linear(tensors, spec), torch.full((3, 2), 1 + 2.0**-9))
    assert torch.equal(
        decode(spec, tensors.__getitem__, torch.bfloat16), torch.full((2, 3), 1 + 2.0**-9).to(torch.bfloat16)
    )


def test_config_round_trip_shares_schemes() -> None:
    fmt = IntegerFormat(4, False, 48, torch.bfloat16)
    specs = {
        "h.0": LinearSpec("t.h.0", "h.0", 4, 6, quantized(fmt), transposed=True),
        "h.1": LinearSpec("h.1", "h.1", 4, 6, quantized(fmt)),
        "h.2": LinearSpec("h.2", "h.2", 4, 6, Scheme((DenseSpec(torch.float16),))),
    }
    plain = plain_config(specs)
    assert len(plain["schemes"]) == 2
    assert parse_config(plain) == specs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"schemes": [{"parts": [{"kind": "tree"}]}]}, "newer than this lilliput"),
        ({"schemes": []}, "damaged"),
        ({"linears": {"x": {}}}, "damaged"),
    ],
)
def test_unknown_and_damaged_entries_are_refused(change: dict[str, Any], message: str) -> None:
    spec, _, _ = made(IntegerFormat(4, True, 32, torch.float16))
    plain = copy.deepcopy(plain_config({"a.b": spec})) | change
    with pytest.raises(SourceError, match=message):
        parse_config(plain)


def test_missing_and_foreign_tensors_are_named() -> None:
    spec, tensors, _ = made(IntegerFormat(4, True, 32, torch.float16))
    with pytest.raises(SourceError, match=r"'a\.b\.weight_scale' is missing"):
        read_linear({"a.b.weight": tensors["a.b.weight"]}, spec)
    with pytest.raises(SourceError, match="do not belong together"):
        read_linear(tensors | {"a.b.weight": torch.zeros(3, dtype=torch.uint8)}, spec)
