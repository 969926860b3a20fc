"""Rows of a packed table, read and decoded by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.formats import known
from lilliput.parts.linear import LinearSpec, decode, decode_rows, divides
from lilliput.parts.quantized import QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.target import Target

ROWS, WIDTH = 83, 24
APART = [
    Target(bits=3, group_size=8, symmetric=False, scale_dtype="float16"),
    Target(bits=5, group_size="channel", scale_dtype="bfloat16"),
    Target(format="affine", bits=4, group_size=8, scale_dtype="float16"),
    Target(format="nf4", bits=4, group_size=8, scale_dtype="float32"),
    Target(format="e2m1", bits=4, group_size=8, scale_dtype="e8m0"),
    Target(format="codebook", bits=3, group_size="channel", scale_dtype="float16"),
]
JOINED = [
    Target(bits=8, group_size="tensor", scale_dtype="float16"),
    Target(format="nvfp4", bits=4, group_size=16, scale_dtype="e4m3"),
    Target(format="nf4", bits=4, group_size=8, scale_dtype="int8/64"),
    Target(format="sign", scale_dtype="float16"),
]


def scheme(target: Target) -> Scheme:
    return Scheme((QuantizedSpec(known.from_target(known.completed(target))),))


@pytest.mark.parametrize("target", APART, ids=str)
def test_rows_are_those_of_the_whole(target: Target) -> None:
    made = scheme(target)
    (part,) = made.parts
    assert isinstance(part, QuantizedSpec)
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    grid = part.format.fit(weight)
    packed = {f"x.weight{k}": v for k, v in part.format.pack(part.format.encode(weight, grid), grid).items()}
    spec = LinearSpec("x", "x", ROWS, WIDTH, made)
    assert divides(made, ROWS, WIDTH)
    asked: list[int] = []

    def read(name: str, cut: tuple[int, int]) -> Tensor:
        asked.append(cut[1] - cut[0])
        return packed[name][cut[0] : cut[1]]

    whole = decode(spec, packed.__getitem__)
    for start, stop in ((0, 1), (3, 9), (8, 16), (79, 83), (0, ROWS)):
        assert torch.equal(decode_rows(spec, read, start, stop, torch.float32), whole[start:stop])
    asked.clear()
    decode_rows(spec, read, 17, 18, torch.float32)
    assert len(asked) == len(packed)
    assert sum(asked) <= 8 * sum(-(-len(x) // ROWS) for x in packed.values())


@pytest.mark.parametrize("target", JOINED, ids=str)
def test_grids_that_join_rows_are_told_apart(target: Target) -> None:
    assert not divides(scheme(target), ROWS, WIDTH)
